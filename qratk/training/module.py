"""The LightningModule: a mixed-precision backbone with one adapter a layer, trained on answers and scored as stored."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.parsing import AttributeDict
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qratk.adapters.base import AdapterMethod, AfterStep, Way, adapters
from qratk.adapters.options import AdapterOptions
from qratk.backbone.backbone import Backbone
from qratk.backbone.logits import (
    labelled_logits,
    model_inputs,
    shared_length,
    target_log_likelihood,
    training_losses,
)
from qratk.core.batching import BATCH_COST
from qratk.core.checks import Checks
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QratkError
from qratk.core.intact import require_intact_archive
from qratk.core.memory import require_ranks
from qratk.core.secrets import without_secrets
from qratk.quantizers.base import Quantizer, quantizers
from qratk.training.accumulation import TokenWeighting
from qratk.training.sharding import ShardedStrategy, require_strategy, shard
from qratk.training.state import TrainingState, device_random_state, set_random_state

_logger = logging.getLogger(__name__)

Schedule = Literal["constant", "linear", "cosine"]

_CALIBRATION_BATCH = 8

DEFAULT_QUANTIZERS: Mapping[int, str] = {2: "hqq", 3: "hqq", 4: "nf4", 8: "int8", 16: "none"}


class NonFiniteLossError(QratkError, ArithmeticError):
    """The loss of a training step is NaN or infinite."""


class FineTuneModule(LightningModule):
    """Fine-tunes the adapters of one configuration over frozen quantised weights.

    Args:
        model: Hugging Face name or local directory of a causal language model; "embedded" is the one shipped here.
        configuration: bits and ranks as text, `4:8` for all layers or `4:8*3 2:16` layer by layer; a search sets it.
        quantizers: quantiser of each bit-width, by registered name or as {class_path, init_args}.
        granularity: what shares one choice: a transformer block, attention and MLP apart, or each projection.
        target_modules: "all" linear projections of the blocks, or the last parts of their names.
        adapter: method of adapters, by registered name or as {class_path, init_args}: "lora", or "adalora", which
            prunes singular directions in training until as many are left as the ranks sum to, wherever they matter
            most; `qratk components adapters` lists all.
        adalora: options of the latter by name.
        alpha_over_rank: LoRA's scaling; constant, so that rank alone differs between layers.
        rslora: scale by alpha / sqrt(rank) instead.
        lora_dropout: dropout before the adapters.
        adapter_dtype: 16-bit type that adapters are stored, counted and scored in; they are trained in float32.
        init: how adapters begin: "default" (no change of the output), "loftq" or "lq_lora" (they make up for the
            quantisation error, by its largest singular values, the latter weighted with Fisher information).
        init_iterations: of quantising and approximating in turn; more than 1 packs the weights anew for each rank.
        init_batches, init_batch_size: training batches for the Fisher information of "lq_lora".
        input_groups: size of the groups of inputs that are summed before an adapter (QA-LoRA); null is none.
        learning_rate, weight_decay, betas: of AdamW.
        warmup_steps: optimiser steps of linear warm-up.
        schedule: what follows the warm-up, down to 0 at `schedule_steps`.
        schedule_steps: optimiser steps of the whole schedule; by default the trainer's total, in a search T_S.
        compute_dtype: type of activations; "auto" is float32 on CPU and bfloat16 on CUDA.
        dense_cache: keep dequantised weights in memory, "off", "on" or "auto" (while there is room): faster, the same
            results.
        bank_dir: folder that keeps packed weights for later runs; "auto" is $QRATK_CACHE or else qratk/banks in the
            user's cache folder, null keeps them in memory only. The same results.
        gradient_checkpointing: trade time for activation memory.
        trust_remote_code: run code that comes with the model; only for sources you trust.
        tokenizer: name or directory of the tokenizer, by default the model's.
        calibration_sequences: training sequences that quantisers such as GPTQ are fitted to, where one is chosen.
        seed: seed of adapter initialisation and dropout.
    """

    def __init__(
        self,
        model: str,
        configuration: str | None = None,
        quantizers: dict[int, Any] | None = None,
        granularity: Literal["block", "sublayer", "linear"] = "block",
        target_modules: str | list[str] = "all",
        adapter: str | dict[str, Any] = "lora",
        adalora: dict[str, Any] | None = None,
        alpha_over_rank: float = 2.0,
        rslora: bool = False,
        lora_dropout: float = 0.0,
        adapter_dtype: Literal["bfloat16", "float16"] = "bfloat16",
        init: str = "default",
        init_iterations: int = 1,
        init_batches: int = 8,
        init_batch_size: int = 8,
        input_groups: int | None = None,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 0,
        schedule: Schedule = "cosine",
        schedule_steps: int | None = None,
        compute_dtype: str = "auto",
        dense_cache: bool | Literal["off", "on", "auto"] = "auto",
        bank_dir: str | None = "auto",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        tokenizer: str | None = None,
        calibration_sequences: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks = Checks()
        checks.at_least(0, learning_rate=learning_rate, weight_decay=weight_decay, warmup_steps=warmup_steps, seed=seed)
        checks.at_least(1, init_batches=init_batches, init_batch_size=init_batch_size, schedule_steps=schedule_steps)
        checks.at_least(1, init_iterations=init_iterations, input_groups=input_groups)
        checks.at_least(1, calibration_sequences=calibration_sequences)
        checks.require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "betas", betas, "must be two in [0, 1)")
        checks.require(0 <= lora_dropout < 1, "lora_dropout", lora_dropout, "must lie in [0, 1)")
        checks.require(alpha_over_rank > 0, "alpha_over_rank", alpha_over_rank, "must be positive")
        checks.require(bank_dir != "", "bank_dir", bank_dir, "must be a folder, 'auto' or null")
        _check_quantizers(checks, quantizers)
        checks.finish()
        built_adapter(adapter, {"adalora": adalora})  # what cannot be is said at once
        self.save_hyperparameters()
        self.strict_loading = False  # checkpoints hold adapters only
        self.configuration: Configuration | None = None
        self.resume_state: TrainingState | None = None
        self.schedule_steps = schedule_steps
        self.last_outcomes: tuple[float, ...] = ()
        self._backbone: Backbone | None = None
        self._scorer: Any = None  # a qratk.data Scorer
        self._scoring = ExitStack()
        self._shared_length: int | None = None
        self._loaded_random: tuple[Tensor, Tensor | None] | None = None
        self._after: AfterStep | None = None
        self._loaded_allocation: Mapping[str, Tensor] = {}

    @property
    def options(self) -> Any:
        """The arguments of the constructor, as attributes."""
        return self.hparams

    @property
    def hparams_initial(self) -> AttributeDict:
        """The arguments as loggers write them: without secrets."""
        return AttributeDict(without_secrets(super().hparams_initial))

    # The backbone

    @property
    def backbone(self) -> Backbone:
        """The backbone; loaded when first asked for."""
        if self._backbone is None:
            self._backbone = self.load_backbone()
            self._backbone.dense_cache(self.options.dense_cache)
            if self.options.gradient_checkpointing:
                self._backbone.enable_gradient_checkpointing()
            self.model = self._backbone.model  # registers the parameters
            self.model.train(self.training)
        return self._backbone

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.backbone.tokenizer

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can see; None when its configuration does not say."""
        return context_length(self.backbone.config)

    def load_backbone(self, *, weights: bool = True) -> Backbone:
        """A new backbone with these options; without weights it lies on the meta device."""
        options = self.options
        adapter = AdapterOptions(
            alpha_over_rank=options.alpha_over_rank,
            rslora=options.rslora,
            dropout=options.lora_dropout,
            dtype=options.adapter_dtype,
            init=options.init,
            init_iterations=options.init_iterations,
            input_groups=options.input_groups,
        )
        return Backbone.load(
            _model_path(options.model),
            quantizers=built_quantizers(options.quantizers),
            granularity=options.granularity,
            target_modules=options.target_modules,
            adapter=adapter,
            method=built_adapter(options.adapter, {"adalora": options.adalora}),
            compute_dtype=options.compute_dtype,
            trust_remote_code=options.trust_remote_code,
            tokenizer=None if options.tokenizer is None else os.path.expanduser(options.tokenizer),
            weights=weights,
            bank_dir=options.bank_dir,
        )

    def calibrate(self, data: Any) -> None:
        """Fit quantisers such as GPTQ, where the options name one, to the training sequences of `qratk.data.TaskData`.

        They depend on the data's options and on `calibration_sequences` alone: the same in a search and in a fit.
        """
        wanted = int(self.options.calibration_sequences)
        if wanted < 1:
            raise ConfigurationError(f"calibration_sequences must be at least 1, got {wanted}")
        if self.backbone.table.calibrated:
            size = min(wanted, _CALIBRATION_BATCH)
            self.backbone.calibrate(data.calibration_batches(-(-wanted // size), size))

    def build_initial(self, choices: Sequence[tuple[int, int]], data: Any) -> None:
        """Make what adapters begin with at these (bits, rank), from a bank built at them; nothing for the default.

        `data` are the `qratk.data.TaskData` that Fisher information is measured on, at 16 bits and without adapters.
        """
        backbone, options = self.backbone, self.options
        if not backbone.needs_initial(choices):
            return
        start, weightings = backbone.adapters.options.start, None
        if start is not None and start.weighted:
            backbone.activate(Configuration.uniform(16, 0, len(backbone.layers)), seed=options.seed)
            batches = data.calibration_batches(options.init_batches, options.init_batch_size)
            weightings = start.weightings(backbone.model, backbone.banks, batches)
        backbone.build_initial(choices, weightings=weightings)

    def activate(self, configuration: Configuration) -> None:
        """Switch to a configuration, with fresh adapters."""
        self.backbone.activate(configuration, seed=self.options.seed)
        self.configuration, self._after = configuration, None

    def setup(self, stage: str) -> None:
        """Load the backbone and switch to the configuration of the options, unless a search has set one."""
        if self._trainer is not None:
            require_precision(self._trainer)
            require_strategy(self._trainer.strategy)
        if stage == "fit":
            self.train()  # Hugging Face models are loaded in eval mode, and Lightning leaves modes alone
        if self.configuration is not None:
            return
        text = self.options.configuration
        if not text:
            raise ConfigurationError(
                "no configuration to train: give --model.configuration, as in '4:8' (4 bits, rank 8 everywhere), "
                "or the best.yaml of a search as --config"
            )
        backbone = self.backbone
        configuration = spread(Configuration.from_text(text), len(backbone.layers))
        require_ranks(backbone.shapes, configuration.ranks)
        choices = sorted({(layer.bits, layer.rank) for layer in configuration.layers})
        if self._trainer is not None and (backbone.needs_initial(choices) or backbone.table.calibrated):
            backbone.model.to(self.trainer.strategy.root_device)  # where a search makes them
        if self._trainer is not None and backbone.table.calibrated:
            self.calibrate(self._data())
        backbone.build_bank(sorted(set(configuration.bits)))
        start = backbone.adapters.options.start
        self.build_initial(choices, self._data() if start is not None and start.weighted else None)
        backbone.release_reference()
        self.activate(configuration)
        backbone.keep_active()
        for note in backbone.notes if self.global_rank == 0 else ():
            backbone.say(note)

    def configure_model(self) -> None:
        """Shard the adapters where the strategy asks for it."""
        if self._trainer is not None and isinstance(self.trainer.strategy, ShardedStrategy):
            self._require("sharded", "leave --trainer.strategy out, or give ddp")
            shard(self.backbone, self.trainer.strategy)

    # Training

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits, (B, T, vocabulary)."""
        inputs = model_inputs(batch, self.backbone.compute_dtype)
        logits: Tensor = self.backbone.model(**inputs, use_cache=False).logits
        return logits

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean negative log-likelihood of the labelled tokens of a batch, in nats."""
        return training_losses(self.backbone.model, batch, overhead=self.pass_cost)[0]

    @property
    def pass_cost(self) -> float | None:
        """Tokens that a pass through the model counts as, where a batch may be cut by length; None where it may not."""
        # Processes that shard the model must do the same passes at the same time.
        several = self._trainer is not None and self._trainer.world_size > 1
        return None if several else BATCH_COST

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss; raises `NonFiniteLossError`."""
        loss = self.training_loss(batch)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(not_finite(float(loss.item()), self.first_step + self.global_step))
        self.log("train/loss", loss, prog_bar=True)
        penalty = self.backbone.adapters.penalty()
        return self._weighting.weighted(loss if penalty is None else loss + penalty, batch["labels"])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Bring the gradients to means over the tokens of the step."""
        self._weighting.finish(parameter for _, parameter in self.backbone.trainable_parameters())

    @property
    def first_step(self) -> int:
        """Optimiser steps that were done before this trainer began."""
        return self.resume_state.steps if self.resume_state else 0

    def on_train_start(self) -> None:
        """Set the random state: of dropout, the only draw in training."""
        self._weighting = TokenWeighting(self.trainer)
        torch.manual_seed(self.options.seed)  # of every device
        if self.resume_state is not None:
            set_random_state(self.resume_state.random, self.resume_state.device_random, self.device)
        elif self._loaded_random is not None:
            set_random_state(*self._loaded_random, self.device)
            self._loaded_random = None

    def on_train_end(self) -> None:
        """Gather sharded adapters, so that one process alone can save them."""
        self.backbone.adapters.gather()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the adapters, continued where a rung ended, and a schedule that depends on the step alone."""
        named = [(name, p) for name, p in self.backbone.trainable_parameters() if p.numel()]
        if not named:
            raise ConfigurationError("nothing to train: every layer has rank 0; give some layer a higher rank")
        optimizer = self.make_optimizer([p for _, p in named], self.trainer)
        if self.resume_state is not None:
            _restore_moments(optimizer, named, self.resume_state.optimizer)
            place_steps(optimizer)
        self._follow(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": self.make_schedule(optimizer, self.trainer, self.first_step)}

    def _require(self, way: Way, cure: str) -> None:
        if refusal := self.backbone.adapters.method.refusal(way):
            raise ConfigurationError(f"{refusal}: {cure}")

    def _follow(self, optimizer: AdamW) -> None:
        if str(self.trainer.precision) == "16-mixed":
            self._require("scaled gradients", "leave --trainer.precision out")
        after = self._after = self.backbone.adapters.after_steps(self._total_steps(self.trainer))
        if after is not None:
            after.load(self.resume_state.optimizer if self.resume_state is not None else self._loaded_allocation)
            # After the optimiser's step, when the gradients are still there; Lightning has not counted the step yet.
            optimizer.register_step_post_hook(lambda *_: after.step(self.first_step + self.global_step + 1))
        self._loaded_allocation = {}

    def _total_steps(self, trainer: Any) -> int:
        return self.schedule_steps or int(trainer.estimated_stepping_batches)

    def make_optimizer(self, parameters: Sequence[torch.nn.Parameter], trainer: Any) -> AdamW:
        """AdamW with the options given, in one fused kernel except where Lightning has to unscale gradients."""
        options = self.options
        factor = self.backbone.adapters.method.learning_rate_factor
        return AdamW(
            parameters,
            lr=factor * options.learning_rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
            fused=not str(trainer.precision).endswith("mixed"),
        )

    def make_schedule(self, optimizer: Optimizer, trainer: Any, start: int) -> Any:
        """Learning rate schedule, as Lightning takes it, of a training that begins after `start` steps."""
        options = self.options
        total = self._total_steps(trainer)
        scheduler = LambdaLR(
            optimizer, lambda step: learning_rate_factor(start + step, total, options.warmup_steps, options.schedule)
        )
        return {"scheduler": scheduler, "interval": "step"}

    def training_state(self) -> TrainingState:
        """What continuing needs, copied to the CPU; to be called right after `Trainer.fit`."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        moments = {}
        for name, parameter in self.backbone.trainable_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                moments[f"{name}/{key}"] = value.detach().cpu().clone()
        moments |= self._after.state() if self._after is not None else {}
        adapter = {name: value.detach().cpu().clone() for name, value in self.backbone.adapter_state().items()}
        steps = self.first_step + self.global_step
        return TrainingState(steps, adapter, moments, torch.get_rng_state(), device_random_state(self.device))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the adapters, for the frozen weights come from the model, and the random states."""
        adapter = self.backbone.adapter_state()
        checkpoint["state_dict"] = {f"adapter.{name}": value for name, value in adapter.items()}
        checkpoint["configuration"] = str(self.configuration)
        checkpoint["allocation"] = self._after.state() if self._after is not None else {}
        checkpoint["random"] = torch.get_rng_state()
        checkpoint["device_random"] = device_random_state(self.device)
        key = LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY
        if key in checkpoint:
            checkpoint[key] = without_secrets(checkpoint[key])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the adapters in place; raises `ConfigurationError` when they are of another configuration or damaged."""
        path = None if self._trainer is None else self.trainer.ckpt_path
        if path and Path(path).is_file():
            require_intact_archive(Path(path))
        stored = checkpoint.get("configuration")
        if stored != str(self.configuration):
            raise ConfigurationError(
                f"the checkpoint is of configuration {stored!r}, but {str(self.configuration)!r} was asked for; "
                "give the same --model.configuration as when it was trained"
            )
        prefix = "adapter."
        state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        self.backbone.load_adapter_state(state)
        checkpoint["state_dict"] = {}
        self._loaded_allocation = checkpoint.get("allocation", {})
        if (random := checkpoint.get("random")) is not None:
            self._loaded_random = random, checkpoint.get("device_random")

    # Scoring

    def _begin_scoring(self, stage: str) -> None:
        self._scorer = self._data().scorer(stage).to(self.device)
        self._scoring.enter_context(self.backbone.stored_precision())

    @property
    def shared_length(self) -> int:
        """Tokens that a scored row in which choices share a prompt may have; 0 when the model cannot take such rows."""
        if self._shared_length is None:
            self._shared_length = shared_length(self.backbone.model)
            if not self._shared_length:
                _logger.warning("the model cannot score choices that share a prompt: each is scored with its own")
        return self._shared_length

    def log_likelihood(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed log-likelihoods of a scoring batch's rows, (R,) float32 in nats, and their labelled tokens, (R,)."""
        return target_log_likelihood(labelled_logits(self.backbone.model, batch), batch)

    def _score(self, batch: dict[str, Tensor]) -> None:
        self._scorer.update(batch, *self.log_likelihood(batch))

    def _end_scoring(self, stage: str) -> None:
        self._scoring.close()
        scorer, self._scorer = self._scorer, None
        if self.trainer.sanity_checking:
            return
        whole = self.trainer.limit_val_batches if stage == "validation" else self.trainer.limit_test_batches
        self.last_outcomes = tuple(scorer.outcomes().double().cpu().tolist()) if whole == 1.0 else ()
        self.log_dict(
            {f"{stage}/{name}": value.float() for name, value in scorer.compute().items()},
            prog_bar=True,
            sync_dist=True,
        )

    def on_validation_epoch_start(self) -> None:
        """Round the adapters to what is stored, so that the score is of what is stored."""
        self._begin_scoring("validation")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score a batch."""
        self._score(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics as validation/<name>; `validation/score` is larger-is-better."""
        self._end_scoring("validation")

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        self._begin_scoring("test")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score a batch."""
        self._score(batch)

    def on_test_epoch_end(self) -> None:
        """Log the metrics as test/<name>."""
        self._end_scoring("test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Row indices (R,), summed log-likelihoods (R,) in nats and labelled tokens (R,) of a batch."""
        with self.backbone.stored_precision():
            log_likelihood, tokens = self.log_likelihood(batch)
        return {"row": batch["row"], "log_likelihood": log_likelihood, "tokens": tokens}

    def _data(self) -> Any:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "scorer"):
            raise ConfigurationError(f"the data must be a qratk.data.TaskData, got {type(data).__name__}")
        return data

    def save_adapter(self, directory: str | Path) -> None:
        """Write the adapter for plain PEFT."""
        assert self.configuration is not None
        self.backbone.save_adapter(directory, self.configuration)


def context_length(config: Any) -> int | None:
    """Tokens that a model of a configuration can see; of a composite one, as of vision and language, its text part."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def require_precision(trainer: Any) -> None:
    """Raise `ConfigurationError` where Lightning would cast the adapters' float32 masters to another type."""
    precision = str(trainer.precision)
    if precision in ("32-true", "bf16-mixed", "16-mixed"):
        return
    cure = {"bf16-true": "--model.compute_dtype=bfloat16", "16-true": "--model.compute_dtype=float16"}
    raise ConfigurationError(
        f"--trainer.precision={precision} would cast the adapters' float32 masters and the model's buffers; leave it "
        f"out and give {cure.get(precision, '--model.compute_dtype')} instead: activations and frozen weights are "
        "of that type then, and the adapters are trained in float32"
    )


def place_steps(optimizer: Optimizer) -> None:
    """Move restored step counts to where AdamW wants them: its fused kernel has them beside the parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device)


def not_finite(loss: float, step: int) -> str:
    """What to tell of a loss that is no number."""
    return (
        f"the loss is {loss} at step {step}; a smaller learning rate or gradient clipping "
        "(--trainer.gradient_clip_val=1.0) is the usual cure"
    )


def learning_rate_factor(step: int, total: int, warmup_steps: int, schedule: Schedule) -> float:
    """Share of the learning rate at a step (from 0): linear warm-up, then constant, linear or cosine down to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def spread(configuration: Configuration, num_layers: int) -> Configuration:
    """Configuration of `num_layers` layers; one choice alone counts for all of them."""
    if len(configuration) == 1:
        return Configuration(configuration.layers * num_layers)
    if len(configuration) != num_layers:
        raise ConfigurationError(
            f"the model has {num_layers} layers, but the configuration has {len(configuration)}: {configuration}"
        )
    return configuration


def built_quantizers(specified: Mapping[Any, Any] | None) -> dict[int, Quantizer]:
    """Quantiser of each bit-width, from names or {class_path, init_args}; what is not given is the default."""
    built: dict[int, Quantizer] = {}
    for bits, chosen in {**DEFAULT_QUANTIZERS, **{int(b): q for b, q in (specified or {}).items()}}.items():
        if isinstance(chosen, Quantizer):
            built[bits] = chosen
            continue
        given, options = (chosen, {}) if isinstance(chosen, str) else _class_and_options(chosen, "a quantiser")
        name = quantizers.name_of(given) or given
        built[bits] = quantizers.create(name, **options)
        if bits not in built[bits].supported_bits:
            raise ConfigurationError(f"quantiser {name!r} does {built[bits].supported_bits} bits, not {bits}")
    return built


def _check_quantizers(checks: Checks, specified: Mapping[Any, Any] | None) -> None:
    for bits, chosen in (specified or {}).items():
        named = isinstance(chosen, str | Quantizer) or (isinstance(chosen, Mapping) and "class_path" in chosen)
        checks.require(named, "quantizers", {bits: chosen}, "must be names, or {class_path, init_args}, by bits")


def built_adapter(given: str | Mapping[str, Any], options: Mapping[str, Mapping[str, Any] | None]) -> AdapterMethod:
    """Method of adapters from a name or {class_path, init_args}, with the options that are given under its name.

    Raises `ConfigurationError` for options of another method.
    """
    name, own = (given, {}) if isinstance(given, str) else _class_and_options(given, "an adapter")
    name = adapters.name_of(name) or name
    for other, more in options.items():
        if more and other != name:
            raise ConfigurationError(
                f"the options {sorted(more)} are those of the adapter {other!r}, and the adapter is {name!r}; "
                f"give --model.adapter={other}, or leave --model.{other} out"
            )
    return adapters.create(name, **{**own, **(options.get(name) or {})})


def _class_and_options(chosen: Mapping[str, Any], one: str) -> tuple[str, dict[str, Any]]:
    if "class_path" not in chosen:
        raise ConfigurationError(f"{one} is a name or {{class_path, init_args}}, got {dict(chosen)}")
    return str(chosen["class_path"]), dict(chosen.get("init_args") or {})


def _model_path(model: str) -> str:
    if model != "embedded":
        return os.path.expanduser(model)
    from qratk.embedded import model_directory

    return str(model_directory())


def _restore_moments(
    optimizer: Optimizer, named: Sequence[tuple[str, torch.nn.Parameter]], moments: Mapping[str, Tensor]
) -> None:
    for name, parameter in named:
        state = {key.rsplit("/", 1)[1]: value for key, value in moments.items() if key.rsplit("/", 1)[0] == name}
        optimizer.state[parameter] = {
            key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
            for key, value in state.items()
        }
