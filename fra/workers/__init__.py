"""Work on several processes or machines through Ray, which is imported when somebody asks for workers."""
