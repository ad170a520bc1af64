"""One offline HTML page about a run: plain data first, then drawing."""
