"""A new user's first hour: 300 labelled SMS and all defaults make a model nearly as good as ten epochs do."""

import csv
import json
import random

import pytest

from fastbert.cli import main

NAMES = ["Anna", "Ben", "Chloe", "Dan", "Ella", "Finn", "Grace", "Hugo", "Ivy", "Jack"]
PLACES = ["the station", "home", "the office", "the gym", "mum's", "the pub", "town", "school"]
TIMES = ["5", "half six", "noon", "8 tonight", "tomorrow", "after class", "in an hour"]
HAM = [
    "Hey {name}, are you still coming to {place} at {time}?",
    "Running late, see you at {place} {time} x",
    "Can you call me back? I'm at {place} now",
    "ok lol. {name} says free tickets for the match, want one?",
    "Did you win your game? {name} told me about it",
    "Sorry i missed your call, in a meeting till {time}",
    "Claim the sofa before {name} gets to {place} haha",
    "Happy birthday {name}!! Have a great day",
    "Pls text me when u get to {place}, your phone was off",
    "I'll pay you back the {money} {time}, promise",
    "{name} wants to know if dinner is at {time}",
    "Lost my phone, this is my new number. {name}",
]
SPAM = [
    "You have won a {money} prize! Call {number} now to claim",
    "URGENT! Your mobile was selected for a {money} award. Txt YES to {number}",
    "Free ringtones for your phone, reply TONE to {number}. Only 50p per msg",
    "Final notice: your account will be closed. Confirm at www.secure-{number}.com",
    "Hi {name}, lonely tonight? Chat now on {number}, 18+ only",
    "Get a loan of {money} today, no checks. Call {number}",
    "Your parcel is waiting, pay {money} customs at www.post-{number}.com",
    "2 for 1 holiday offer ends {time}! Ring {number} to book",
]


HELD_OUT_HAM = [
    "Mum asks if {name} eats fish, tell her before {time}",
    "Just got out of the cinema, going to {place} with {name}",
    "I won't make it {time}, can we do it another day?",
    "U still owe {name} {money} for the tickets lol",
    "Is it free parking near {place}? arriving {time}",
    "No worries, call u when i finish at {place}",
    "{name} is ill so no training {time}",
    "What a lovely prize cake {name} made, come to {place} and try",
]
HELD_OUT_SPAM = [
    "Congratulations {name}! A {money} shopping voucher is reserved for you, text WIN to {number}",
    "Your bank card is blocked, verify your details at www.help-{number}.com",
    "New games and wallpapers for your mobile, send PLAY to {number}. 150p per week",
    "Owed {money} from a past accident? Ring {number} free for your claim",
    "Singles near {place} want to meet you, text MEET to {number}",
]


def sms(seed: int, n: int, ham: list[str], spam: list[str]) -> list[tuple[str, str]]:
    """Texts made of templates, of which 13 % are spam, in random order."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        kind, templates = ("spam", spam) if i < round(0.13 * n) else ("ham", ham)
        values = {"name": rng.choice(NAMES), "place": rng.choice(PLACES), "time": rng.choice(TIMES)}
        values |= {"money": f"£{rng.choice([5, 20, 100, 500, 2000])}", "number": rng.randrange(80000, 99999)}
        text = rng.choice(templates).format(**values)
        rows.append((text.lower() if rng.random() < 0.3 else text, kind))
    rng.shuffle(rows)
    return rows


@pytest.mark.slow
def test_all_defaults_reach_nine_tenths_of_what_ten_epochs_reach(tmp_path, minilm):
    """The dev texts are of templates that training has not: what is told apart is not learned by heart."""
    for name, seed, n, *templates in (("train", 0, 300, HAM, SPAM), ("dev", 1, 150, HELD_OUT_HAM, HELD_OUT_SPAM)):
        with open(tmp_path / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *sms(seed, n, *templates)])
    files = ["--train", str(tmp_path / "train.csv"), "--dev", str(tmp_path / "dev.csv")]
    f1 = {}
    for name, options in (("defaults", []), ("ten", ["--epochs", "10"])):
        out = tmp_path / name
        command = ["finetune", "--task", "classification", "--model", str(minilm), *files, "-o", str(out), *options]
        assert main(command) == 0
        f1[name] = json.loads((out / "report" / "metrics.json").read_text())["dev"]["f1_macro"]
    assert f1["ten"] > 0.8, f1  # one class everywhere has 0.47
    assert f1["defaults"] >= 0.9 * f1["ten"], f1
