"""Worker processes on Ray: started, replaced when they die, asked one question at a time."""
