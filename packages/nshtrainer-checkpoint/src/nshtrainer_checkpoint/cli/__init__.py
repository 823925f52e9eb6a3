"""`nshtrainer checkpoint`: list, verify, prune and export what training has saved."""
