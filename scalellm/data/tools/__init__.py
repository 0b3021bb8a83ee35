"""Looking after datasets: what is in one, is it sound, how do two differ, and making one of ids.

All of it reads through the public interface of `TokenDataset`; nothing read from is ever changed.
"""
