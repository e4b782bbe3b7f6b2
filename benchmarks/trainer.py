"""transformers' Trainer at its best on a CPU, for benchmarks that train it beside this project."""

import time

from tqdm import tqdm

__all__ = ["train"]


def train(model, examples, collate, folder, steps, name, after_step=lambda step, seconds, model: None, **settings):
    """Trains for so many steps; returns the seconds of the steps. SDPA is the model's; fused AdamW, a linear schedule,
    nothing logged or saved are here; `settings` are TrainingArguments' others. `name` is for the progress bar.

    after_step(step, seconds so far, model) is called after each; its own time does not count.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    bar = tqdm(total=steps, desc=f"transformers, {name}", unit="step", leave=False)

    class Following(TrainerCallback):
        def on_train_begin(self, *arguments, **state):
            self.began = time.perf_counter()

        def on_step_end(self, arguments, state, control, model, **others):
            stopped = time.perf_counter()
            self.seconds = stopped - self.began
            bar.update()
            after_step(state.global_step, self.seconds, model)
            self.began += time.perf_counter() - stopped

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        **settings,
    )
    following = Following()
    trainer = Trainer(model, arguments, collate, examples, callbacks=[following])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    bar.close()
    return following.seconds
