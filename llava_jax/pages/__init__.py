"""HTML reports of the other packages: one base template, tables, curves and thumbnails."""
