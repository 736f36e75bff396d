"""The order of arguments, and usage errors, of every command."""

import itertools

import pytest

from fastbert.cli.main import build_parser

COMMANDS = {
    "embed": [["M", "a.csv", "b.csv"], ["--column", "body"], ["-o", "out.npy"], ["-q"]],
    "fill-mask": [["M", "a [MASK]", "b"], ["--top-k", "3"], ["--json"]],
    "prepare": [["a.txt", "b.txt"], ["-o", "out"], ["--vocab", "v"], ["--no-pairs"]],
    "pretrain": [["config.toml"], ["--resume"], ["--set", "a.b=1"]],
    "finetune": [["--task", "classification"], ["--model", "M"], ["--train", "a", "--dev", "b"], ["-o", "out"]],
    "distill": [["config.toml"], ["--temperature", "2"], ["--teacher", "T"], ["-o", "out"]],
    "doctor": [["--debug"]],
}


def values(args):
    found = vars(build_parser().parse_args(args))
    return {name: value for name, value in found.items() if name != "parser"}


@pytest.mark.parametrize("command", COMMANDS)
def test_any_order_of_arguments_means_the_same(command):
    parts = COMMANDS[command]
    expected = values([command, *itertools.chain(*parts)])
    for order in itertools.permutations(parts):
        assert values([command, *itertools.chain(*order)]) == expected


def test_positional_arguments_stand_on_both_sides_of_options():
    parsed = values(["embed", "M", "a.csv", "--column", "body", "b.csv"])
    assert (parsed["model"], parsed["inputs"], parsed["column"]) == ("M", ["a.csv", "b.csv"], "body")
    assert values(["embed", "--column", "body", "M"])["inputs"] == ["-"]
    assert values(["prepare", "a", "-o", "out", "b", "--vocab", "v", "c"])["inputs"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("args", "prog", "message"),
    [
        (["embed"], "fastbert embed", "the following arguments are required: MODEL"),
        (["embed", "M", "--bogus"], "fastbert embed", "unrecognized arguments: --bogus"),
        (["prepare", "a", "-o", "out"], "fastbert prepare", "one of the arguments --vocab --learn-vocab is required"),
        (["doctor", "x"], "fastbert doctor", "unrecognized arguments: x"),
        ([], "fastbert", "the following arguments are required: COMMAND"),
    ],
)
def test_a_usage_error_is_two_lines(capsys, args, prog, message):
    with pytest.raises(SystemExit) as raised:
        build_parser().parse_args(args)
    assert raised.value.code == 2
    assert capsys.readouterr().err == f"{prog}: error: {message}\nsee {prog} --help\n"
