"""The main job from end to end: data, surgery, checkpointing, Hugging Face's Trainer; stock against UnSwag."""
