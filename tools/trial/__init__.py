"""What train.py alone uses: tasks, nets, training runs and what is made of them."""
