// AMX's tiles on a processor that has none: there each of their instructions raises SIGILL, and the handler does what
// Intel's manual (volume 2) says of it. So what is tested is what ships, with its assembly. Compiled into the extension
// for the base instruction set where csrc/CMakeLists.txt has FASTBERT_AMX_EMULATION=ON.
#include "../csrc/cpu/kernels.h"

#include <signal.h>
#include <ucontext.h>
#include <xmmintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fastbert {
namespace {

constexpr int TILES = 8, ROWS = 16, ROW_BYTES = 64;

struct Tile {
    int rows, row_bytes;  // as configured
    alignas(ROW_BYTES) uint8_t bytes[ROWS][ROW_BYTES];
};
struct Tiles {
    bool configured;
    Tile tile[TILES];
};
thread_local Tiles tiles;

[[noreturn]] void refuse(const char* what) {
    std::fprintf(stderr, "an AMX instruction that no processor would carry out: %s\n", what);
    std::abort();
}

// What VEX says of an instruction: C4, a byte with the map, one with the third register, the opcode, and operands.
class Instruction {
  public:
    Instruction(const uint8_t* code, const greg_t* registers) : code_(code), registers_(registers) {}

    bool is_amx() const {  // map 0F38, 128 bits, W0
        return code_[0] == 0xc4 && (code_[1] & 0x1f) == 2 && (code_[2] & 0x84) == 0 &&
               (opcode() == 0x49 || opcode() == 0x4b || opcode() == 0x5c || opcode() == 0x5e);
    }
    int opcode() const { return code_[3]; }
    int prefix() const { return code_[2] & 3; }  // none, 66, F3, F2
    bool in_memory() const { return code_[4] >> 6 != 3; }
    int reg() const { return (code_[4] >> 3 & 7) | extension(7); }
    int rm() const { return (code_[4] & 7) | extension(5); }
    int vvvv() const { return ~code_[2] >> 3 & 15; }
    int length() const { return 5 + has_sib() + (in_memory() ? displacement_bytes() : 0); }

    // The operand in memory. A tile's stride stands in the place of an index, 0 where there is none, and counts rows.
    char* address(int64_t row = 0) const {
        const int mode = code_[4] >> 6, sib = code_[5];
        const int base = has_sib() ? (sib & 7) | extension(5) : rm();
        const int index = has_sib() ? (sib >> 3 & 7) | extension(6) : 4;
        int64_t at = 0;
        if (mode == 0 && !has_sib() && (base & 7) == 5) at = registers_[REG_RIP] + length();
        else if (mode || (base & 7) != 5) at = value(base);
        if (index != 4) at += (value(index) * (1 << (sib >> 6))) * (opcode() == 0x4b ? row : 1);
        return reinterpret_cast<char*>(at + displacement());
    }
    bool has_sib() const { return in_memory() && (code_[4] & 7) == 4; }

  private:
    const uint8_t* code_;
    const greg_t* registers_;

    int extension(int bit) const { return code_[1] >> bit & 1 ? 0 : 8; }
    int displacement_bytes() const {
        const int mode = code_[4] >> 6;
        const bool no_base = mode == 0 && ((has_sib() ? code_[5] : code_[4]) & 7) == 5;
        return mode == 1 ? 1 : mode == 2 || no_base ? 4 : 0;
    }
    int64_t displacement() const {
        const uint8_t* at = code_ + 5 + has_sib();
        if (displacement_bytes() == 1) return static_cast<int8_t>(*at);
        int32_t far = 0;
        if (displacement_bytes() == 4) std::memcpy(&far, at, sizeof far);
        return far;
    }
    int64_t value(int number) const {
        static constexpr int ORDER[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                          REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        return registers_[ORDER[number]];
    }
};

void configure(const char* memory) {
    uint8_t config[64];
    std::memcpy(config, memory, sizeof config);
    if (config[0] != 1) refuse("ldtilecfg with a palette other than 1");
    if (config[1]) refuse("ldtilecfg in the middle of a tile");
    for (int i = 2; i < 16; ++i)
        if (config[i]) refuse("ldtilecfg with a reserved byte set");
    for (int i = 0; i < 16; ++i) {
        const int rows = config[48 + i], row_bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8;
        if (i >= TILES ? rows || row_bytes : rows > ROWS || row_bytes > ROW_BYTES || !rows != !row_bytes)
            refuse("ldtilecfg with a tile too large, or one too many");
        if (i < TILES) tiles.tile[i].rows = rows, tiles.tile[i].row_bytes = row_bytes;
    }
    tiles.configured = true;
    for (Tile& tile : tiles.tile) std::memset(tile.bytes, 0, sizeof tile.bytes);
}

Tile& tile_of(int number) {
    if (!tiles.configured) refuse("a tile before ldtilecfg, or after tilerelease");
    if (number >= TILES || !tiles.tile[number].rows) refuse("a tile that is not configured");
    return tiles.tile[number];
}

void load(const Instruction& op) {
    Tile& tile = tile_of(op.reg());
    std::memset(tile.bytes, 0, sizeof tile.bytes);
    for (int i = 0; i < tile.rows; ++i) std::memcpy(tile.bytes[i], op.address(i), tile.row_bytes);
}

void store(const Instruction& op) {
    const Tile& tile = tile_of(op.reg());
    for (int i = 0; i < tile.rows; ++i) std::memcpy(op.address(i), tile.bytes[i], tile.row_bytes);
}

template <typename T>
T read(const uint8_t* bytes, int i) {
    T value;
    std::memcpy(&value, bytes + i * sizeof value, sizeof value);
    return value;
}
template <typename T>
void write(uint8_t* bytes, int i, T value) { std::memcpy(bytes + i * sizeof value, &value, sizeof value); }

float bf16_at(const uint8_t* bytes, int i) {
    const uint32_t bits = static_cast<uint32_t>(read<uint16_t>(bytes, i)) << 16;
    return read<float>(reinterpret_cast<const uint8_t*>(&bits), 0);
}

// Even halves of words and odd ones are summed apart; their product is exact in fp32, so each step rounds once.
void dot_bf16(Tile& c, const Tile& a, const Tile& b) {
    for (int m = 0; m < c.rows; ++m) {
        float even[ROW_BYTES / 4] = {}, odd[ROW_BYTES / 4] = {};
        for (int k = 0; k < a.row_bytes / 4; ++k)
            for (int n = 0; n < c.row_bytes / 4; ++n) {
                even[n] += bf16_at(a.bytes[m], 2 * k) * bf16_at(b.bytes[k], 2 * n);
                odd[n] += bf16_at(a.bytes[m], 2 * k + 1) * bf16_at(b.bytes[k], 2 * n + 1);
            }
        for (int n = 0; n < c.row_bytes / 4; ++n)
            write(c.bytes[m], n, read<float>(c.bytes[m], n) + (even[n] + odd[n]));
    }
}

// Four bytes, unsigned in `a` and signed in `b`.
void dot_bytes(Tile& c, const Tile& a, const Tile& b) {
    for (int m = 0; m < c.rows; ++m)
        for (int k = 0; k < a.row_bytes / 4; ++k)
            for (int n = 0; n < c.row_bytes / 4; ++n) {
                uint32_t sum = read<uint32_t>(c.bytes[m], n);
                for (int i = 0; i < 4; ++i)
                    sum += static_cast<uint32_t>(a.bytes[m][4 * k + i] * static_cast<int8_t>(b.bytes[k][4 * n + i]));
                write(c.bytes[m], n, sum);
            }
}

// False where it is none of those that the kernels use.
bool carry_out(const Instruction& op) {
    enum { NONE, P66, PF3, PF2 };
    if (op.opcode() < 0x50 && op.vvvv()) return false;
    if (op.opcode() == 0x49 && op.prefix() == NONE && !op.reg()) {
        if (op.in_memory()) return configure(op.address()), true;
        if (!op.rm()) return tiles.configured = false, true;
    }
    if (op.opcode() == 0x49 && op.prefix() == PF2 && !op.in_memory() && !op.rm())
        return std::memset(tile_of(op.reg()).bytes, 0, sizeof Tile::bytes), true;
    if (op.opcode() == 0x4b && op.has_sib() && (op.prefix() == PF2 || op.prefix() == P66)) return load(op), true;
    if (op.opcode() == 0x4b && op.has_sib() && op.prefix() == PF3) return store(op), true;
    const bool of_bf16 = op.opcode() == 0x5c && op.prefix() == PF3, of_bytes = op.opcode() == 0x5e && op.prefix() == P66;
    if (op.in_memory() || !(of_bf16 || of_bytes)) return false;
    Tile &c = tile_of(op.reg()), &a = tile_of(op.rm()), &b = tile_of(op.vvvv());
    if (&c == &a || &c == &b || &a == &b) refuse("a product with one tile twice");
    if (a.rows != c.rows || b.row_bytes != c.row_bytes || b.rows * 4 != a.row_bytes) refuse("tiles that do not fit");
    return (of_bf16 ? dot_bf16 : dot_bytes)(c, a, b), true;
}

struct sigaction before;

void on_illegal_instruction(int signal, siginfo_t* info, void* context) {
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const Instruction op(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
    _mm_setcsr(0x9fc0);  // as tiles round: to nearest, with zeros for denormal numbers; the kernel gives back what was
    if (op.is_amx() && carry_out(op)) registers[REG_RIP] += op.length();
    else if (before.sa_flags & SA_SIGINFO) before.sa_sigaction(signal, info, context);
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) before.sa_handler(signal);
    else {
        sigaction(signal, &before, nullptr);     // and the instruction, tried again, ends the process
        if (info->si_code <= 0) raise(signal);   // or the signal that was sent
    }
}

}  // namespace

void emulate_amx() {
    static const bool installed = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_illegal_instruction;
        action.sa_flags = SA_SIGINFO;
        return sigaction(SIGILL, &action, &before) == 0;
    }();
    if (!installed) refuse("no handler could be installed");
}

}  // namespace fastbert
