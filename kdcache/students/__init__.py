"""Students: what they are made from, how they are loaded, fed, trained and scored."""

from kdcache.students.config import StudentConfig
from kdcache.students.load import Student, load_student
from kdcache.students.sizes import SIZES

__all__ = ["SIZES", "Student", "StudentConfig", "load_student"]
