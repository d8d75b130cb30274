"""What others do with several sources, in the same harness: for comparison."""
