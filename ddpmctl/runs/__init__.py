"""Run folders: their files, finding them again, and what a run was made from. Training writes them; every command reads them."""
