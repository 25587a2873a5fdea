"""Where tuned configs are kept: the database, its schema and migrations, and the documents they travel in.

What a look-up imports from here (``location``, ``records``, ``snapshot``, ``sqlite_file``) imports no SQLAlchemy.
"""
