"""The commands of ``gblr``, a file each; those of one room alone, ``compress`` and ``bench``, stand in their room."""
