"""Benchmarks: one file per question, one command each (`python -m bench.memory --help`), results in bench/results/*.json."""
