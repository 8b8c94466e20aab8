"""The run whose commands are tested."""

from pathlib import Path

from tests.tiny import shallow_model

TINY = Path(__file__).parents[2] / "examples" / "tiny"


MODEL = shallow_model()


CONFIG = f"""\
model:
  name_or_path: {MODEL}
  dtype: float32
lora:
  r: 4
  lora_alpha: 16
  target_modules: [q_proj, down_proj]
  rank_pattern: {{down_proj: 2}}
data:
  train: train.jsonl
  eval: heldout.jsonl
  max_seq_length: 128
train:
  max_steps: 3
  learning_rate: 3.0e-2
  lr_scheduler_type: constant
  gradient_checkpointing: none
eval:
  strategy: steps
  steps: 2
  exact_match: true
  exact_match_rows: 2
  max_new_tokens: 4
save:
  output_dir: run
  save_steps: 1
log:
  report_to: [jsonl, tensorboard]
"""


PROMPT = "The basket is brown, made of stone, in aisle 2."


def prepare(folder):
    """Writes a config and a few rows of the example into a folder."""
    for name, count in (("train.jsonl", 8), ("heldout.jsonl", 4)):
        rows = (TINY / "data" / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(rows[:count]))
    (folder / "run.yaml").write_text(CONFIG)
