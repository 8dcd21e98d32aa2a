"""How fast is a reduced model beside the dense one, here?"""
