"""`qratk test`: the score on the test data, and lm-eval tasks."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from qratk.cli.application import QratkCLI, run
from qratk.cli.parser import LmEvalOptions


class TestCommand(QratkCLI):
    """Lightning's test, then lm-eval's tasks."""

    command = "test"

    def after_test(self) -> None:
        """Run lm-eval on what was tested, when tasks are given."""
        options: LmEvalOptions = self._get(self.config_init, "lm_eval")
        if not options.tasks:
            return
        from qratk.data.lm_eval import evaluate_lm_eval

        backbone = self.model.backbone
        with backbone.stored_precision():  # as the adapter is saved, and as Lightning's test scored it
            scores = evaluate_lm_eval(
                backbone.model,
                backbone.tokenizer,
                options.tasks,
                task_folders=options.task_folders,
                batch_size=options.batch_size,
                limit=options.limit,
                device=str(self.trainer.strategy.root_device),
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.fewshot_as_multiturn,
            )
        print(yaml.safe_dump({"lm_eval": scores}, sort_keys=False), end="")


def test(arguments: Sequence[str]) -> int:
    """Exit status of `qratk test`."""
    return run(TestCommand, arguments)
