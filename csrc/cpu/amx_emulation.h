// See amx_emulation.cpp. Linux on x86 only.
#pragma once

namespace fastbert {

// From now on the instructions of AMX that the kernels use are carried out, slowly, on a processor without them: until
// somebody else takes SIGILL (faulthandler does, so enable it before).
void emulate_amx();

}  // namespace fastbert
