"""A small tokenizer, and the folder of a run with it and a random model."""

import json

import jax
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from layerskip_jax.config import RunConfig
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.training.checkpoint import Checkpoints
from tests.interop.helpers import CONFIG, END, EXITS, STEP, random_parameters


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = "the quick brown fox jumps over the lazy dog while the cat sat on the mat"
    tokenizer.train_from_iterator([corpus] * 9, trainer)
    assert tokenizer.get_vocab_size() == 290
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, tokenizer_file):
    """Returns a function that writes the folder of a run and returns it with its parameters."""

    def make(config=CONFIG, manifest=None, **settings):
        folder = RunFolder(tmp_path_factory.mktemp("run"))
        definition, parameters = random_parameters(config)
        run = RunConfig(model=config, **settings)
        folder.config_file.write_text(json.dumps(run.to_dict()))
        manifest = manifest or {"end_token": END, "end_token_id": 0, "vocab_size": 290}
        folder.data_file.write_text(json.dumps(manifest))
        folder.tokenizer_file.write_bytes(tokenizer_file.read_bytes())
        records = [{"step": STEP, "exits": EXITS}, {"step": STEP + 1, "exits": []}]
        folder.evaluations_file.write_text("".join(json.dumps(r) + "\n" for r in records))
        checkpoints = Checkpoints(folder.checkpoints, keep=1)
        checkpoints.save(STEP, parameters, {"count": jax.numpy.zeros(())})
        checkpoints.close()
        return folder, definition, parameters

    return make


@pytest.fixture(scope="session")
def run(make_run):
    """The folder of a run of `CONFIG`, its definition and its parameters; not to be changed."""
    return make_run()
