"""What `import packager` shows: typed calls with the command's defaults. They check what they are given and call the
rooms below.
"""
