"""What an import costs: `import jaxllm` is cheap and help imports no JAX."""

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_importing_the_package_takes_under_300_ms():
    code = (
        "import time; start = time.perf_counter(); import jaxllm; "
        "seconds = time.perf_counter() - start; import sys; "
        "print(seconds, *[m for m in ('tensorflow', 'torch', 'jax') if m in sys.modules])"
    )
    seconds, *heavy = min(run(code) for _ in range(3)).split()
    assert float(seconds) < 0.3 and not heavy


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom jaxllm.cli.main import main\n"
        "try:\n    main(['sample', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('loaded', *[m for m in ('tensorflow', 'torch', 'jax', 'numpy') if m in sys.modules])"
    )
    assert run(code) == "loaded"


def test_the_commands_import_neither_torch_nor_tensorflow():
    code = (
        "import sys\nimport jaxllm.cli.commands, jaxllm.images.demo, jaxllm.images.convert\n"
        "print('loaded', *[m for m in ('tensorflow', 'torch') if m in sys.modules])"
    )
    assert run(code) == "loaded"
