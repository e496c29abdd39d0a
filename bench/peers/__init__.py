"""Tests of others, run on operated models."""
