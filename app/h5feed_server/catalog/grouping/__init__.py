"""Which arrays are fields of one dataset, and in which order its rows follow. The rules, in their order:

1. `families`: which files may belong together, by what is declared, their names and their folders.
2. `alike`: what files whose names differ in a number, or in a word, are to each other, by what is in them: parts of one
   dataset, one sample each, one class each, or nothing.
3. `weights`: files of a model's weights are no data.
4. `collapse`: names of splits win: groups and arrays that are called after some are pieces of the same fields; then
   groups of the same members are episodes (`episodes`), or samples (`stacking`).
5. `classes`: arrays that are alike in all but their lengths and names are classes.
6. `tables`: arrays of one level that share their rows are fields of one dataset; whatever nobody claims is a dataset
   of its own.
7. `fuel`: an attribute of the file may name its splits.

Each asks for evidence. Where that speaks for two readings, none is taken: what is listed says which lines of
``h5feed.toml`` decide.
"""
