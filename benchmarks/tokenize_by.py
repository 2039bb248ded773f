"""Tokenizes files of JSON lines in one of the ways that `prepare.py` compares with.

    python benchmarks/tokenize_by.py WAY TEXT TOKENIZER OUTPUT CORES

Prints the tokens, without those that end documents, and the seconds of the part that counts, as
JSON. Each way runs in a process of its own, perhaps of another environment, so nothing of this
package is imported here.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CHUNK_CHARACTERS = 1 << 22  # of a core, tokenized at once
PART_CHARACTERS = 1 << 20
END_TOKEN = "<|endoftext|>"


def main() -> int:
    """Runs one way."""
    way, text, tokenizer, output, cores = sys.argv[1:]
    tokens, seconds = WAYS[way](Path(text), Path(tokenizer), Path(output), int(cores))
    print(json.dumps({"tokens": tokens, "seconds": seconds}))
    return 0


def limit(text: Path, file: Path, output: Path, cores: int) -> tuple[int, float]:
    """Tokenizes what is in memory, a chunk at a time; reading and parsing are not counted.

    A long text keeps one core busy while the others wait, and takes more than its share of time, so
    it is given in parts. Words are cut there, which changes a token or two of a million.
    """
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    tokenizer = Tokenizer.from_file(str(file))
    tokens, seconds = 0, 0.0
    for chunk in chunks(parts(text), CHUNK_CHARACTERS * cores):
        begun = time.perf_counter()
        encodings = tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
        tokens += sum(map(len, encodings))
        del encodings
        seconds += time.perf_counter() - begun
    return tokens, seconds


def parts(folder: Path) -> Iterator[str]:
    """Yields the texts, long ones in parts that end with a line."""
    for file in sorted(folder.glob("*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                text, start = json.loads(line)["text"], 0
                while len(text) - start > PART_CHARACTERS:
                    end = text.find("\n", start + PART_CHARACTERS) + 1 or len(text)
                    yield text[start:end]
                    start = end
                if start < len(text):
                    yield text[start:]


def chunks(texts: Iterator[str], characters: int) -> Iterator[list[str]]:
    """Groups texts of so many characters together."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def datasets(text: Path, file: Path, output: Path, cores: int) -> tuple[int, float]:
    """Maps the tokenizer over a data set of the text, from arrow to arrow; only that is counted."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes fill the cores
    os.environ["HF_HOME"] = os.environ["HF_DATASETS_CACHE"] = str(output / "cache")
    import pyarrow as pa
    from datasets import Features, load_dataset
    from datasets.utils.logging import disable_progress_bar
    from tokenizers import Tokenizer

    disable_progress_bar()
    files = [str(file) for file in sorted(text.glob("*.jsonl"))]
    rows = load_dataset("json", data_files=files, split="train", num_proc=cores)
    tokenizer = Tokenizer.from_file(str(file))

    def encode(batch: dict) -> dict:
        found = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [encoding.ids for encoding in found]}

    begun = time.perf_counter()
    made = rows.map(
        encode,
        batched=True,
        num_proc=cores,
        remove_columns=rows.column_names,
        features=Features.from_arrow_schema(pa.schema([("ids", pa.list_(pa.int32()))])),
    )
    seconds = time.perf_counter() - begun
    return sum(len(chunk.flatten()) for chunk in made.data.column("ids").chunks), seconds


def datatrove(text: Path, file: Path, output: Path, cores: int) -> tuple[int, float]:
    """Runs datatrove's reader and its `DocumentTokenizer`, a file a task, without its shuffling."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes fill the cores
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    begun = time.perf_counter()
    tokenize = DocumentTokenizer(
        str(output / "tokens"), str(file), eos_token=END_TOKEN, shuffle_documents=False
    )
    LocalPipelineExecutor(
        [JsonlReader(str(text), text_key="text"), tokenize],
        tasks=len(list(text.glob("*.jsonl"))),
        workers=cores,
        logging_dir=str(output / "logs"),
    ).run()
    seconds = time.perf_counter() - begun
    size = sum(file.stat().st_size for file in (output / "tokens").glob("*.ds"))
    documents = sum(file.stat().st_size // 8 for file in (output / "tokens").glob("*.index"))
    return size // tokenize.token_size - documents, seconds


def megatron(text: Path, file: Path, output: Path, cores: int) -> tuple[int, float]:
    """Does as Megatron-LM's `preprocess_data.py`: a pool encodes lines, this process writes ids.

    It is written anew here, after what that does: documents one by one, 25 lines to a worker at
    once, ids in 2 or 4 bytes in one file, and their lengths beside it.
    """
    import multiprocessing

    import numpy as np
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    begun = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(file))
    end = tokenizer.token_to_id(END_TOKEN)
    kind = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int32
    output.mkdir(parents=True, exist_ok=True)
    lengths = []
    context = multiprocessing.get_context("spawn")
    with (output / "text.bin").open("wb") as ids, context.Pool(cores, _begin, (str(file),)) as pool:
        names = sorted(text.glob("*.jsonl"))
        lines = itertools.chain.from_iterable(name.open(encoding="utf-8") for name in names)
        for document in pool.imap(_encode, lines, 25):
            array = np.array([*document, end], kind)
            ids.write(array.tobytes())
            lengths.append(len(array))
    np.save(output / "text.idx", np.array(lengths, np.int32))
    return sum(lengths) - len(lengths), time.perf_counter() - begun


def _begin(file: str) -> None:
    from tokenizers import Tokenizer

    global _tokenizer
    _tokenizer = Tokenizer.from_file(file)


def _encode(line: str) -> list[int]:
    return _tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids


WAYS: dict[str, Callable[[Path, Path, Path, int], tuple[int, float]]] = {
    "limit": limit, "datasets": datasets, "datatrove": datatrove, "megatron": megatron,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
