"""From plain values to the blocks of a page: a function per section, empty if it has nothing."""
