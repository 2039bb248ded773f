"""The run that these tests read, and tasks of local files."""

import json

import pytest

from tests.interop.conftest import make_run, run, tokenizer_file  # noqa: F401


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """Two tasks of local files: one of choices, one to generate for."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": "the quick brown", "choices": [" fox", " mat", " cat"], "answer": 0},
        {"question": "the cat sat on the", "choices": [" fox", " mat"], "answer": 1},
        {"question": "over the lazy", "choices": [" jumps", " dog", " the", " sat"], "answer": 1},
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
num_fewshot: 0
doc_to_text: "{{{{question}}}}"
"""
    (folder / "local_choice.yaml").write_text(
        "task: local_choice\noutput_type: multiple_choice"
        + shared
        + 'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        + "metric_list:\n  - metric: acc\n"
    )
    (folder / "local_text.yaml").write_text(
        "task: local_text\noutput_type: generate_until"
        + shared
        + 'doc_to_target: "{{choices[answer]}}"\n'
        + 'generation_kwargs:\n  until: ["\\n\\n"]\n  max_gen_toks: 8\n'
        + "metric_list:\n  - metric: exact_match\n"
    )
    return folder
