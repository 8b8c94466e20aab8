"""A search for what would run foreign code."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOREIGN = {
    "pickle": "imports pickle, marshal, shelve, dill, yaml or torch",
    "eval": "calls eval, exec, compile or __import__",
    "shell": "starts a shell",
    "remote code": "trusts remote code, or pickles of numpy",
}


"""What no file of the package may do."""


def find_foreign_code(path: Path) -> list[str]:
    """Returns what a file does of it, a key of `FOREIGN` each."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        modules = {"pickle", "marshal", "shelve", "dill", "yaml", "torch", "cloudpickle"}
        found += ["pickle" for name in names if name.split(".")[0] in modules]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        found += ["eval"] * (called in ("eval", "exec", "compile", "__import__"))
        found += ["shell"] * (called in ("os.system", "os.popen"))
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            found += ["shell"] * (keyword.arg == "shell" and value != "False")
            trusting = keyword.arg in ("trust_remote_code", "allow_pickle") and value != "False"
            found += ["remote code"] * trusting
    return found


def search_for_foreign_code(count: int, folder: Path) -> tuple[int, int]:
    """S2: no file of the package unpickles, evaluates, starts a shell or trusts remote code."""
    planted = folder / "planted.py"
    planted.write_text("import pickle; eval(x); os.system(y); f(trust_remote_code=True)")
    assert sorted(find_foreign_code(planted)) == sorted(FOREIGN)
    files = [p for root in ("lorax", "kernels/lorax_kernels") for p in (ROOT / root).rglob("*.py")]
    hits = {(kind, path) for path in files for kind in find_foreign_code(path)}
    for kind, path in sorted(hits):
        print(f"     {path} {FOREIGN[kind]}")
    return len(files) - len({path for _, path in hits}), len(files)
