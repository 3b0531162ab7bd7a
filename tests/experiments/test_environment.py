"""What a run says of its machine."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import environment

CORE = """processor\t: {n}
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: {model}
model name\t: AMD EPYC
stepping\t: 1

"""


@pytest.mark.parametrize(("text", "named"), [
    (CORE.format(n=0, model=17) + CORE.format(n=1, model=99), "AMD EPYC (family 25, model 17, stepping 1)"),
    (CORE.format(n=0, model=1), "AMD EPYC (family 25, model 1, stepping 1)"),
    ("model name\t: A core\n", "A core"),
    ("Hardware\t: a board\n", "by platform"),
    ("CPU implementer\t: 0x41\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n",
     "by platform (implementer 0x41, part 0xd0c, variant 0x3)"),
    (None, "by platform"),
])  # fmt: skip
def test_a_processor_is_named_with_its_generation(monkeypatch: pytest.MonkeyPatch, text: str | None, named: str):
    _tells(monkeypatch, text)
    monkeypatch.setattr("platform.processor", lambda: "by platform")
    assert environment.cpu_name() == named


@pytest.mark.parametrize(("answer", "named"), [("Apple M9\n", "Apple M9"), ("\n", "arm"), (None, "arm")])
def test_macos_is_asked_for_the_name(monkeypatch: pytest.MonkeyPatch, answer: str | None, named: str):
    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command == ["sysctl", "-n", "machdep.cpu.brand_string"]
        if answer is None:
            raise FileNotFoundError(command[0])
        return SimpleNamespace(stdout=answer)

    _tells(monkeypatch, None)
    monkeypatch.setattr("platform.processor", lambda: "arm")
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("subprocess.run", run)
    assert environment.cpu_name() == named


@pytest.mark.parametrize(("text", "has"), [
    ("flags\t\t: fpu avx2 sse4_1 avx512f amx_tile fma hypervisor\n\nflags\t\t: avx512_fp16\n",
     {"processor": "amx_tile avx2 avx512f fma sse4_1"}),
    ("Features\t: fp asimd sve2 crc32 bf16\n", {"processor": "asimd bf16 sve2"}),
    ("flags\t\t: fpu hypervisor\n", {}),
    (None, {}),
])  # fmt: skip
def test_vector_instructions_are_torchs_choice_and_the_processors(
    monkeypatch: pytest.MonkeyPatch, text: str | None, has: dict[str, str]
):
    _tells(monkeypatch, text)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert environment.cpu_instructions() == {"torch": "AVX2"} | has


def _tells(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    def read(self: Path, **_: object) -> str:
        if text is None:
            raise FileNotFoundError(self)
        return text

    monkeypatch.setattr(Path, "read_text", read)
