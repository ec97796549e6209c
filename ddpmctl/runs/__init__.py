"""Run folders: their files, how they are found, and the sources of a run. Training writes them; every command reads them."""
