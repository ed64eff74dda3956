"""``timm-xformers report``: finished runs side by side.

* `runs` finds them, `groups` joins those that differ in nothing but the seed, `report` and
  `report_plots` show them.
"""
