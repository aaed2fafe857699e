"""Finetuning: objectives, update rules, and the numbers that a zeroth-order run is."""
