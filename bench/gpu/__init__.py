"""`make gpu-check`: what holds on a real NVIDIA GPU, in stages of at most five minutes that can be taken up again."""
