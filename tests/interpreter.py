"""Triton's interpreter, without what it does again and again, and with NumPy of today.

Whenever a kernel calls a function, the interpreter looks through all names of `triton.language` for those
that it replaces: half of the time of small programs. Which names these are does not change, and within a
kernel they have been replaced already. Nor does the type of NumPy that stands for one of Triton's. And where
a kernel needs a number of Python, versions of Triton before 3.7 ask an array of one element for it, which
NumPy 2.4 no longer gives.
"""

import functools
import inspect


def remember_names():
    """Let the interpreter look its names and types up once in this process."""
    from triton import language
    from triton.language import core
    from triton.runtime import interpreter

    names = ("_patch_builtin", "_patch_attr", "_get_np_dtype", "_patch_lang", "_LangPatchScope")
    if not all(hasattr(interpreter, name) for name in names):
        # Another version, which the tests need not be quick with.
        return

    @functools.cache
    def names_of(package):
        # Called before anything has been replaced.
        return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]

    def patch_builtin(package, builder, *scope):
        for name in names_of(package):
            member = getattr(package, name)
            if core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, *scope)

    @functools.cache
    def languages_of(function):
        found = function.__globals__.values()
        return [each for each in (language, core) if any(value is each for value in found)]

    patch_language = interpreter._patch_lang

    def patch_once(function):
        # One name stands for all, which are replaced together.
        if all(not core.is_builtin(each.load) for each in languages_of(function)):
            return interpreter._LangPatchScope()
        return patch_language(function)

    type_of = interpreter._get_np_dtype
    type_of_number = functools.cache(type_of)

    def get_np_dtype(kind):
        # Types of blocks and of pointers have no hash.
        return type_of_number(kind) if type(kind) is core.dtype else type_of(kind)

    interpreter._patch_builtin, interpreter._get_np_dtype = patch_builtin, get_np_dtype
    interpreter._patch_lang = patch_once


def take_numbers_from_arrays():
    """Let tensors of one element be numbers of Python, with any NumPy."""
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None:
        # Another version, made for another NumPy.
        return

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
