"""What a run shows while it trains: one bar, and a line for each log and each score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from st_kdmcse.training.checkpoints import METRIC, SCORE

_PARTS_OF_NO_LOSS = {"loss", "grad_norm", "learning_rate", "epoch", "step"}


class ShowProgress(ProgressCallback):
    """The bar of the stock trainer, with lines that are meant to be read."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write what was logged above the bar."""
        line = log_line(logs or {})
        if line and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(f"step {state.global_step} of {state.max_steps}: {line}")


def log_line(logs: Mapping[str, Any]) -> str:
    """What the trainer logged, in words; empty for what the summary says.

    Args:
        logs: a score on STS-B dev, or a loss with its terms and the negatives removed.

    Example:
        >>> log_line({"loss": 5.33, "text": 0.058, "image": 5.52, "image_negatives_removed": 0.25, "grad_norm": 1.4})
        'loss 5.33 (text 0.058, image 5.52), image negatives removed 0.25, gradient norm 1.4'
        >>> log_line({"eval_sts-dev_spearman_cosine": 0.5832, "eval_runtime": 0.97})
        'dev score 58.32'
    """
    if METRIC in logs:
        chosen_by = f", metric {float(logs[SCORE]):.4g}" if logs.get(SCORE, logs[METRIC]) != logs[METRIC] else ""
        return f"dev score {100 * float(logs[METRIC]):.2f}{chosen_by}"
    if "loss" not in logs:
        return ""
    shown = {name: f"{value:.4g}" for name, value in logs.items() if isinstance(value, float | int)}
    others = {name.replace("_", " "): value for name, value in shown.items() if name not in _PARTS_OF_NO_LOSS}
    terms = [f"{name} {value}" for name, value in others.items() if " " not in name]
    parts = [f"loss {shown['loss']}" + (f" ({', '.join(terms)})" if terms else "")]
    parts += [f"{name} {value}" for name, value in others.items() if " " in name]
    if "grad_norm" in shown:
        parts.append(f"gradient norm {shown['grad_norm']}")
    return ", ".join(parts)
