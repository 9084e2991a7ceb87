"""What changed between two sessions, and over many: numpy and scipy only, never torch.

load (files -> sessions) -> order (git) -> compare (a verdict a case and metric) -> text
"""
