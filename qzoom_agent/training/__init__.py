"""Training: rewards, the branches (gate and SD-RPN), supervised fine-tuning and GRPO."""
