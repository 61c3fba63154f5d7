"""What the README says exists; what the style forbids does not."""
import importlib
import os
import re

import pytest

from tests.conftest import ROOT

SCRIPTS = [f for f in sorted(os.listdir(ROOT)) if f.endswith(".py")]
TESTS = "\n".join(open(os.path.join(ROOT, "tests", f)).read() for f in os.listdir(os.path.join(ROOT, "tests"))
                  if f.endswith(".py"))


def read(name):
    with open(os.path.join(ROOT, name)) as f:
        return f.read()


def test_equation_table_names_functions_and_tests():
    section = read("README.md").split("## Equations")[1].split("\n## ")[0]
    rows = re.findall(r"^\|.*\| `(\w+)\.(\w+)` \| `(\w+)` \|$", section, re.M)
    assert len(rows) == section.count("\n|") - 2 == 16
    for module, function, test in rows:
        assert callable(getattr(importlib.import_module(module), function))
        source = re.search(rf"^def {test}\(.*?(?=^def |\Z)", TESTS, re.M | re.S)
        assert source, test
        # by its own name, or by a helper of that file that calls it
        helpers = re.findall(rf"^def (\w+)\((?:(?!^def ).)*?\b{function}\(", TESTS, re.M | re.S)
        called = [name for name in (function, *helpers) if name != test and re.search(rf"\b{name}\(", source[0])]
        assert called, (function, test)


@pytest.mark.parametrize("page, least", [("README.md", 6), ("docs/wan.md", 5), ("docs/ablations.md", 6)])
def test_pages_name_files_that_exist(page, least):
    text, folder = read(page), os.path.dirname(page)
    names = set(re.findall(r"(?:python3?|torchrun\b.*?) (\w+\.py)", text))
    links = {os.path.join(folder, link) for link in re.findall(r"\]\(((?!http)[\w./]+)(?:#[\w-]+)?\)", text)}
    assert len(names | links) >= least
    for name in names | links | {"samples/lr/apple.mp4", "weights/niqe_pris_params.npz", "samples/media.json"}:
        assert os.path.exists(os.path.join(ROOT, name)), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_forbidden(name):
    source = read(name)
    for bad in (r"\.cuda\(", r"\bexec\(", r"getattr\(cfg", r"/work\b", r"\.\./shared", r"TODO"):
        assert not re.search(bad, source), bad
    for call in re.findall(r"torch\.load\([^)]*\)", source):
        assert "weights_only=True" in call


@pytest.mark.parametrize("name", [f for f in SCRIPTS if f.startswith(("stage", "evaluate"))])
def test_every_constant_is_read_and_explained(name):
    module = importlib.import_module(name[:-3])
    source = read(name) + read("data.py") + read("common.py") + read("model.py")
    for field in module.Config.__dataclass_fields__:
        assert re.search(rf"\bcfg\.{field}\b", source), f"{name}: {field} is never read"
        assert re.search(rf"^    {field}: .*#\s*\S", read(name), re.M), f"{name}: {field} has no comment"
