"""What a job will need, said before anything is loaded: a ledger of each phase, and the settings that fit a budget."""
