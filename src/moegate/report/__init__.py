"""The report of `moegate bench`: numbers from its JSON, plots of them, and one page that needs nothing else."""
