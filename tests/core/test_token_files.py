"""Files of tokens: uint16 and uint32, bare or with the header of llm.c; what looks like another type is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flows.run.prepare import pack_corpus
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.unused import notes
from stackwise_core.data.packing import corpus_facts, pack, read_corpus
from stackwise_core.data.tokenizer import ByteTokenizer
from stackwise_core.errors import CorpusError
from stackwise_core.stages.plan import plan_config

IDS = np.random.default_rng(0).integers(0, 60_000, 999)
WIDE = np.random.default_rng(1).integers(0, 128_256, 999)
GPT2, LLAMA3 = (20240520, 1), (20240801, 7)


def write(path: Path, tokens: np.ndarray, dtype: str, header: tuple[int, int] | None = None, more: int = 0) -> Path:
    """With a header as `write_datafile` of llm.c makes it: 256 int32 of magic number, version and count."""
    integers = np.zeros(256, dtype="<i4")
    if header:
        integers[:3] = (*header, len(tokens) + more)
    path.write_bytes((integers.tobytes() if header else b"") + tokens.astype(dtype).tobytes())
    return path


def read(path: Path | str, token_type: str = "auto") -> list[int]:
    corpus = read_corpus(str(path), token_type=token_type)
    assert corpus_facts(str(path), token_type=token_type) == (corpus.digest, corpus.n_bytes)
    train, validation = pack(corpus, ByteTokenizer(), 1, 0, 0.1)
    assert corpus.n_bytes == len(train) + len(validation)
    return [*train.tokens.ravel().tolist(), *validation.tokens.ravel().tolist()]


@pytest.mark.parametrize("token_type", ["auto", "uint16"])
def test_uint16_with_and_without_a_header_is_the_same_corpus(tmp_path: Path, token_type: str) -> None:
    bare, headed = write(tmp_path / "a.bin", IDS, "<u2"), write(tmp_path / "b.bin", IDS, "<u2", GPT2)
    assert read(bare, token_type) == read(headed, token_type) == IDS.tolist()
    assert corpus_facts(str(bare)) == corpus_facts(str(headed))


def test_uint32_is_read_if_a_header_or_the_user_says_so(tmp_path: Path) -> None:
    bare, headed = write(tmp_path / "a.bin", WIDE, "<u4"), write(tmp_path / "b.bin", WIDE, "<u4", LLAMA3)
    assert read(bare, "uint32") == read(headed, "uint32") == read(headed) == WIDE.tolist()
    assert corpus_facts(str(bare), token_type="uint32") == corpus_facts(str(headed))


@pytest.mark.parametrize("largest", [32_000, 128_256, 262_144])
def test_what_looks_like_uint32_is_not_read_as_uint16(tmp_path: Path, largest: int) -> None:
    tokens = (np.random.default_rng(0).random(2_000) ** 4 * largest).astype(int)  # frequent tokens have low ids
    path = write(tmp_path / "a.bin", tokens, "<u4")
    with pytest.raises(
        CorpusError, match=r"a\.bin looks like integers of 32 bits: .* every second value is 0, .*type: uint32"
    ):
        read_corpus(str(path))
    assert len(read(path, "uint16")) == 4_000  # told so
    long = write(tmp_path / "b.bin", tokens, "<u8")
    with pytest.raises(CorpusError, match=r"integers of 64 bits: read as uint32, .*; write them as uint32"):
        read_corpus(str(long), token_type="uint32")


@pytest.mark.parametrize("tokens", [[0] * 50, [1] * 50, [7, 0, 0, 9] * 20, [300, 1] * 50, list(range(259)) * 2])
def test_real_uint16_does_not_look_like_uint32(tmp_path: Path, tokens: list[int]) -> None:
    assert read(write(tmp_path / "a.bin", np.array(tokens), "<u2")) == tokens


@pytest.mark.parametrize(
    ("header", "more", "token_type", "says"),
    [
        (GPT2, 1, "auto", "has a header that promises 1,000 uint16 tokens, and holds 999; it was cut off or damaged"),
        (GPT2, -1, "auto", "promises 998 uint16 tokens, and holds 999"),
        (LLAMA3, 0, "auto", r"promises 999 uint32 tokens, and holds 499\.5"),
        (GPT2, 0, "uint32", "has a header of uint16 tokens; set data.token_type: auto"),
        ((20240520, 2), 0, "auto", r"header 20240520, version 2, which is not known; .*20240801 \(version 7, uint32"),
        ((20240522, 1), 0, "auto", "begins with the header 20240522, version 1, which is not known"),
    ],
)
def test_a_header_that_is_not_true_is_named(
    tmp_path: Path, header: tuple[int, int], more: int, token_type: str, says: str
) -> None:
    path = write(tmp_path / "a.bin", IDS, "<u2", header, more)
    with pytest.raises(CorpusError, match=rf"^data\.source: .*a\.bin .*{says}"):
        read_corpus(str(path), token_type=token_type)


def test_widths_are_not_mixed_and_sizes_must_fit(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", IDS, "<u2")
    write(tmp_path / "b.bin", WIDE, "<u4", LLAMA3)
    with pytest.raises(CorpusError, match=r"it names tokens of 16 bits \(.*a\.bin\) and of 32 \(.*b\.bin\)"):
        read_corpus(f"{tmp_path}/*.bin")
    with pytest.raises(CorpusError, match=r"has 1,998 bytes, no multiple of 4; a \.bin holds uint32 tokens"):
        read_corpus(str(tmp_path / "a.bin"), token_type="uint32")


def test_the_configuration_says_the_type(tmp_path: Path) -> None:
    path, header = write(tmp_path / "a.bin", WIDE, "<u4"), write(tmp_path / "b.bin", WIDE, "<u4", LLAMA3)
    values = {
        "data": {"source": str(path), "token_type": "uint32", "seq_len": 8},
        "model": {"vocab_size": 128_256},
        "training": {"progressive": {"training_objective": "clm"}},
    }
    config = StackWiseConfig.from_dict(values)
    told = plan_config(config)
    train, _ = pack_corpus(config, read_corpus(str(path), token_type="uint32"))
    assert train.tokens.ravel().tolist() == WIDE.tolist()[: train.tokens.size]
    config.data.source, config.data.token_type = str(header), "auto"
    assert plan_config(config) == told
    config.model.vocab_size = 100_000
    at = int((WIDE >= 100_000).argmax())
    with pytest.raises(CorpusError, match=rf"token {at} \(at byte {1024 + 4 * at:,}\) is {WIDE[at]}, which is outside"):
        pack_corpus(config, read_corpus(str(header)))
    write(path, IDS[:998], "<u2")
    with pytest.raises(CorpusError, match=r"no vocabulary is so large; .* set data\.token_type: uint16"):
        pack_corpus(config, read_corpus(str(path), token_type="uint32"))


def test_a_type_without_a_bin_is_noted() -> None:
    config = StackWiseConfig.from_dict({"data": {"token_type": "uint32"}})
    assert notes(config) == ["not used: data.token_type (data.source: stdlib)"]
    config.data.source = "tokens/*.BIN"
    assert notes(config) == []
