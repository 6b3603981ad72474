"""The recipe of the paper's setting: its commands are ones that the command line takes, with the paper's settings."""

from __future__ import annotations

from dataclasses import fields

import pytest
import typer

import paper
from spectr.cli.app import app
from spectr.training import TrainingSettings


def commands(capsys, *given):
    paper.main(["--work", "nowhere", "--only-print", *given])
    return [line.split()[1:] for line in capsys.readouterr().out.splitlines()]


def parsed(command):
    """What the command line makes of a command, without running it."""
    context = typer.main.get_command(app).make_context("spectr", list(command))
    name, inner, rest = context.command.resolve_command(context, context._protected_args + context.args)
    return name, inner.make_context(name, rest, parent=context).params


def test_every_command_is_one_of_the_command_line(capsys, tmp_path):
    found = commands(capsys, "--tasks", "sst2,cola", "--ranks", "2,8", "--limit", "2", "--data-root", str(tmp_path))
    names = [parsed(command)[0] for command in found]
    assert names == ["train"] * 4 + ["evaluate"] * 7
    assert parsed(found[-1])[1]["experiment"] == "ranks"


def test_the_experts_have_the_papers_settings(capsys):
    trainings = [parsed(command)[1] for command in commands(capsys, "--base", "some/model") if command[0] == "train"]
    assert len(trainings) == 9
    plain = TrainingSettings(dropout=0.05, seed=42)
    for given in trainings:
        assert given["letters"]
        assert given["model"] == "some/model"
        assert given["examples"] is None
        names = [field.name for field in fields(TrainingSettings) if field.name in given]
        assert len(names) == 14, "all but the length of gradients"
        assert {name: given[name] for name in names} == {name: getattr(plain, name) for name in names}


def test_other_ranks_keep_the_scale(capsys):
    ranked = [parsed(command)[1] for command in commands(capsys, "--tasks", "sst2", "--ranks", "2,64")]
    sizes = [(given["rank"], given["alpha"]) for given in ranked if "rank" in given]
    assert sizes == [(8, 16), (2, 4), (64, 128)]


def test_nothing_is_made_when_commands_are_only_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands(capsys)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        paper.main([])
