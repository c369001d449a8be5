"""The local web page of a trained run, made with Gradio; ``pyglow-fast serve`` imports it and nothing else does."""
