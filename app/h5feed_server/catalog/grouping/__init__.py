"""Decides which arrays are fields of the same dataset, and in which order its rows are. The rules, in order:

1. `families`: which files may form one dataset, by declarations, names and folders.
2. `alike`: how files whose names differ in a number or a word are related, by their contents: parts of one dataset, one
   sample each, one class each, or unrelated.
3. `weights`: files with the weights of a model are not data.
4. `collapse`: groups and arrays that are named after splits are pieces of the same fields. Then groups with the same
   members are episodes (`episodes`) or samples (`stacking`).
5. `classes`: arrays that are alike except for their lengths and names are classes.
6. `tables`: arrays of one level with the same rows are fields of one dataset. All others are separate datasets.
7. `fuel`: an attribute of the file may define splits.

Each rule needs evidence. If the evidence is ambiguous, the files are not served, and the listing gives the lines of
``h5feed.toml`` that resolve it.
"""
