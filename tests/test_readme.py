"""Every command in the README and in docs/ exists and parses; every file the README lists is there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for page in (README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))
    for block in re.findall(r"```bash\n(.*?)```", page, re.S)
    for line in block.splitlines()
    if line.strip()
]
USERS_ENVIRONMENT = re.compile(r"^[A-Z_]+=")  # CACHED_PATH=... in front of a command


def program_and_flags(command):
    """The .py or .sh file of a command, and what follows it."""
    words = [word for word in shlex.split(command) if not USERS_ENVIRONMENT.match(word)]
    place = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    return words[place], words[place + 1 :]


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_readme_names_a_file_and_flags_it_takes(command):
    program, flags = program_and_flags(command)
    assert (ROOT / program).is_file()
    if program.startswith("main_"):
        module = importlib.import_module(program.removesuffix(".py"))
        module.parse_args(flags)  # raises for an unknown flag or a bad value


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_link_of_the_readme_leads_to_a_file(path):
    assert (ROOT / path).exists()


def file_map():
    """Paths of the README's file table, a{b,c} spelled out and bare names put into their row's folder."""
    for cell in re.findall(r"^\| (`.*?) \|", README.split("## Files")[1], re.M):
        folder = ""
        for name in re.findall(r"`([^`]+)`", cell):
            folder = name.rpartition("/")[0] if "/" in name else folder
            base = name if "/" in name or not folder else f"{folder}/{name}"
            choice = re.search(r"\{(.*?)\}", base)
            for option in choice[1].split(",") if choice else [""]:
                yield base.replace(choice[0], option) if choice else base


@pytest.mark.parametrize("path", list(file_map()))
def test_file_of_the_map_exists(path):
    assert (ROOT / path).exists()


def test_every_program_at_the_root_is_in_the_map():
    assert {p.name for p in ROOT.glob("main_*.py")} <= set(file_map())
