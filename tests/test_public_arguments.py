"""Public functions refuse an argument of another kind by its name, and name what to pass."""

import pytest
from flax import nnx

import lorax
from lorax.config.explain import ConfigError
from lorax.data.reading.rows import DataError
from tests.tiny import shallow_model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = [f"save.output_dir={folder}/run", f"model.name_or_path={shallow_model()}"]
    return lorax.load_config("configs/tiny_cpu.yaml", settings)


@pytest.fixture(scope="module")
def tokenizer(config):
    return lorax.load_tokenizer(config.model.name_or_path)


def test_settings_are_a_run_config():
    for call in (lorax.build_model, lambda config: lorax.Trainer(nnx.List([]), config, None)):  # pyright: ignore
        with pytest.raises(TypeError, match=r"config must be a lorax\.RunConfig.*got dict"):
            call({"model": {}})  # pyright: ignore


def test_rows_of_a_trainer_are_encoded(config):
    said = r"train_data must be encoded rows, as lorax\.load_encoded_dataset returns, got list"
    with pytest.raises(TypeError, match=said):
        lorax.Trainer(nnx.List([]), config, [{"text": "a"}])  # pyright: ignore
    with pytest.raises(TypeError, match=r"model must be an nnx\.Module.*got null"):
        lorax.Trainer(None, config, None)  # pyright: ignore


def test_rows_come_from_a_path_or_from_the_config(config, tokenizer):
    data = config.data
    right = lorax.load_encoded_dataset(data.train, data, tokenizer)
    path = data.train[0].path
    for given in (path, [path]):
        rows = lorax.load_encoded_dataset(given, data, tokenizer)
        assert len(rows) == len(right) and rows.report == right.report
    with pytest.raises(DataError, match=r"no source of rows: pass a path, .*sets data\.eval$"):
        lorax.load_encoded_dataset((), data, tokenizer)
    with pytest.raises(ConfigError, match=r"DataConfig: train"):
        lorax.load_encoded_dataset([5], data, tokenizer)  # pyright: ignore
    with pytest.raises(TypeError, match=r"config must be a lorax\.DataConfig, such as"):
        lorax.load_encoded_dataset(data.train, config, tokenizer)
    with pytest.raises(TypeError, match=r"pass lorax\.load_tokenizer\('some/model'\)"):
        lorax.load_encoded_dataset(data.train, data, "some/model")  # pyright: ignore


def test_adapters_are_saved_of_a_model_into_a_path(tmp_path):
    with pytest.raises(TypeError, match=r"model must be an nnx\.Module with adapters, got 'here'"):
        lorax.save_adapter("here", tmp_path)  # pyright: ignore
    with pytest.raises(TypeError, match=r"directory must be the path of an adapter's folder"):
        lorax.load_adapter(nnx.List([]), nnx.List([]))  # pyright: ignore


def test_a_folder_that_is_not_there_is_named_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    said = rf"no such folder in {tmp_path} \(did you mean models/llama\?\)"
    with pytest.raises(ValueError, match=said):
        lorax.load_model("./models/lama")
