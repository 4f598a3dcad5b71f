"""Facts of a Hugging Face directory: architecture, tokenizer, chat template, text. No torch."""
