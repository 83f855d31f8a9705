"""Completion scripts, the one for bash by a bash that uses it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from engine.cli import _parser, main
from engine.completion import script


def _completed(line: str, folder: Path) -> list[str]:
    """What bash offers for the last word of a command line."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    call = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _twinstream; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    (folder / "completion.bash").write_text(script(_parser(), "bash"))
    command = ["bash", "--norc", "-c", f"source {folder / 'completion.bash'}; {call}"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not out.stderr
    return out.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("twinstream g", ["generate"]),
        ("twinstream --v", ["--version"]),
        ("twinstream train ", ["infusion", "ico", "-h", "--help"]),
        ("twinstream generate --guidance-s", ["--guidance-scale"]),
        ("twinstream generate a cat --model x --wild", ["--wildcards"]),
        ("twinstream train ico --ra", ["--rank"]),
        ("twinstream train infusion --ra", []),
        ("twinstream generate --sampler dpmpp_2m", ["dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde"]),
        ("twinstream generate --schedule s", ["sgm_uniform"]),
        ("twinstream generate pict", []),
        ("twinstream completion ", ["-h", "--help"]),
    ],
)
def test_bash(tmp_path: Path, line: str, expected: list[str]) -> None:
    assert _completed(line, tmp_path) == expected


def test_every_command_and_option_is_in_every_script() -> None:
    bash, zsh, fish = (script(_parser(), shell) for shell in ("bash", "zsh", "fish"))
    assert bash in zsh
    assert "bashcompinit" in zsh
    for name in ("generate", "batch", "serve", "info", "completion", "infusion", "ico"):
        assert f" {name}" in bash
        assert f"-a {name} -d '" in fish
    for option in ("--negative-prompt", "--from", "--count", "--lora", "--prior-weight"):
        assert option in bash
        assert f"-l {option[2:]}" in fish
    assert "-l quiet -d" in fish, "no value follows it"
    assert "-l steps -r -d" in fish
    assert "-l sampler -x -a 'ddim pndm" in fish


def test_fish_reads_it(tmp_path: Path) -> None:
    fish = shutil.which("fish")
    if fish is None:
        pytest.skip("no fish here")
    (tmp_path / "t.fish").write_text(script(_parser(), "fish"))
    command = [fish, "--no-config", "-c", f"source {tmp_path / 't.fish'}; complete -C 'twinstream gen'"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("generate")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert capsys.readouterr().out == script(_parser(), shell)
    assert main(["completion", "tcsh"]) == 1
    assert "shell must be one of bash, zsh, fish, got 'tcsh'" in capsys.readouterr().err
