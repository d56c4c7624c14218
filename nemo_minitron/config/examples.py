"""Calls of each command that its help shows; the tests compose every one."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "convert": (
        "minitron convert input_name_or_path=/models/Llama-3.2-1B output_path=teacher.nemo",
        "minitron convert input_name_or_path=student.nemo output_path=student_hf precision=bf16 verify=true",
        "minitron convert input_name_or_path=student.nemo output_path=student.gguf quantization=q8_0",
    ),
    "preprocess": (
        "minitron preprocess input=articles.jsonl tokenizer.type=teacher.nemo output_prefix=data/train workers=8",
        "minitron preprocess input=wikitext dataset.config=wikitext-103-v1 dataset.split=validation "
        "tokenizer.type=teacher.nemo output_prefix=data/validation",
        "minitron preprocess input=chats.jsonl 'json_keys=[messages]' tokenizer.type=teacher.nemo "
        "output_prefix=data/chats",
    ),
    "synthesize": ("minitron synthesize model=tiny output_path=random_hf",),
    "finetune": (
        "minitron finetune model.restore_from_path=teacher.nemo model.nemo_path=corrected.nemo "
        "'model.data.data_prefix={train:[1.0,train_text_document],validation:[val_text_document]}' "
        "model.data.seq_length=4096 trainer.max_steps=30 trainer.devices=8 model.tensor_model_parallel_size=8",
    ),
    "importance": (
        "minitron importance model.restore_from_path=teacher.nemo calibration.data_prefix=data/train_text_document "
        "calibration.seq_length=512 output_path=scores",
    ),
    "search": (
        "minitron search model.restore_from_path=teacher.nemo scores=scores budget.num_parameters=4.5e9 "
        "evaluate.data_prefix=data/validation_text_document evaluate.seq_length=512 output_path=search",
    ),
    "prune": (
        "minitron prune model.restore_from_path=teacher.nemo prune.scores=scores prune.ffn_hidden_size=9216 "
        "prune.hidden_size=3072 export.save_path=student.nemo",
        "minitron prune model.restore_from_path=teacher.nemo prune=minitron_4b_depth export.save_path=student.nemo",
    ),
    "distill": (
        "minitron distill model.restore_from_path=student.nemo model.kd_teacher_restore_from_path=teacher.nemo "
        "model.nemo_path=distilled.nemo "
        "'model.data.data_prefix={train:[1.0,train_text_document],validation:[val_text_document]}' "
        "model.data.seq_length=4096 trainer.max_steps=1000",
    ),
    "evaluate": (
        "minitron evaluate model.restore_from_path=distilled.nemo "
        "evaluate.data_prefix=data/validation_text_document evaluate.seq_length=512 output_path=distilled.json",
        "minitron evaluate model.restore_from_path=distilled.nemo evaluate.perplexity=false "
        "'evaluate.lm_eval.tasks=[arc_easy,hellaswag]' output_path=tasks.json",
    ),
    "generate": (
        "minitron generate model.restore_from_path=distilled.nemo 'prompt=The capital of France is' "
        "inference.tokens_to_generate=64",
        "minitron generate model.restore_from_path=distilled.nemo chat=true",
        "minitron generate model.restore_from_path=distilled_hf prompts=prompts.txt inference.greedy=true "
        "output_path=answers.jsonl",
    ),
    "report": ("minitron report run_dir=runs/smollm2_135m",),
    "run": (
        "minitron run recipe=smollm2_135m",
        "minitron run recipe=smollm2_135m recipe.settings.max_steps=1000 recipe.settings.ffn_hidden_size=768",
        "minitron run recipe=llama3_1_8b_width recipe.settings.source=/models/Meta-Llama-3.1-8B",
    ),
    "doctor": ("minitron doctor", "minitron doctor output_path=doctor.json"),
}
"""Command → whole lines as one would type them; ``help_text`` folds them."""
